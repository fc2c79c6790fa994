"""The feed of all runs of an org: in order, whole, and never past a transaction that is still running."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.engine import feeds
from millpond.engine.context import Context
from millpond.engine.events import Fact, append
from millpond.engine.feeds import FIRST, OrgEvent, Place, Wanted
from millpond.engine.submit import submit
from millpond.errors import InvalidInput


async def echo(ctx: Context, value: int) -> int:
    return await ctx.step("same", _same, value)


async def _same(value: int) -> int:
    return value


async def read_all(
    pond: Pond, after: Place = FIRST, *, wanted: Wanted = feeds.ALL, limit: int = 7
) -> list[OrgEvent]:
    found: list[OrgEvent] = []
    while True:
        async with pond.db.org(pond.org_id) as con:
            page = await feeds.page(con, pond.org_id, after, wanted=wanted, limit=limit)
        found += page.events
        after = page.reached
        if not page.has_more:
            return found


async def settled(pond: Pond, count: int, **options: Wanted) -> list[OrgEvent]:
    """Read until so many events stand below every running transaction."""
    async with asyncio.timeout(DEADLINE_S):
        while len(found := await read_all(pond, **options)) < count:
            await asyncio.sleep(0.02)
    return found


@asynccontextmanager
async def held_open(pond: Pond, flow: str) -> AsyncIterator[uuid.UUID]:
    """Submit a run in a transaction that is held open until the block ends."""
    async with pond.db.org(pond.org_id) as con:
        intent = pond.intent(flow, 0)
        await submit(con, [intent])
        yield intent.run_id


async def test_every_event_of_every_run_is_told_once_with_its_number_in_the_run(
    pond: Pond, other_org: int
) -> None:
    pond.flow(echo)
    async with pond.worker():
        runs = [await pond.submit("echo", number) for number in range(20)]
        await pond.submit("echo", 0, org_id=other_org)
        for run_id in runs:
            await pond.ended(run_id)
    stored = {(run_id, one.event_no) for run_id in runs for one in await pond.events(run_id)}
    found = await settled(pond, len(stored))
    assert {(one.event.run_id, one.event.event_no) for one in found} == stored
    assert len(found) == len(stored)
    assert [one.place for one in found] == sorted(one.place for one in found)
    for run_id in runs:
        numbers = [one.event.event_no for one in found if one.event.run_id == run_id]
        assert sorted(numbers) == [*range(1, len(numbers) + 1)]
    assert {one.flow for one in found} == {"echo"}


async def test_nothing_is_read_past_a_transaction_that_still_runs_and_nothing_is_skipped(
    pond: Pond,
) -> None:
    first = await pond.submit("echo", 1)
    (before,) = await settled(pond, 1)
    assert before.event.run_id == first
    async with held_open(pond, "echo") as held:
        later = await pond.submit("echo", 2)
        assert await pond.kinds(later) == ["run.queued"]  # committed, and readable in its run
        assert await read_all(pond, before.place) == []
    found = await settled(pond, 3)
    assert [one.event.run_id for one in found] == [first, held, later]
    assert [one.event.run_id for one in await read_all(pond, before.place)] == [held, later]


async def test_a_stream_waits_for_the_oldest_transaction_and_goes_on(pond: Pond) -> None:
    first = await pond.submit("echo", 1)
    await settled(pond, 1)
    told: list[uuid.UUID] = []
    tail = feeds.tail(pond.db, pond.feed, pond.org_id, FIRST)
    async with asyncio.timeout(DEADLINE_S):
        told.append((await anext(tail)).event.run_id)
        upcoming = asyncio.ensure_future(anext(tail))
        async with held_open(pond, "echo") as held:
            later = await pond.submit("echo", 2)
            pond.hints.changed([later])
            assert await asyncio.wait({upcoming}, timeout=0.5) == (set(), {upcoming})
        told += [(await upcoming).event.run_id, (await anext(tail)).event.run_id]
    await tail.aclose()
    assert told == [first, held, later]


async def test_a_stream_that_finds_nothing_is_seldom_read_again_however_many_runs_of_others_change(
    pond: Pond, urls: Urls
) -> None:
    reads = 0

    async def count(point: str) -> None:
        nonlocal reads
        reads += point == "after:org"

    db = await Database.connect(urls.app, probe=count)
    tail = feeds.tail(db, pond.feed, pond.org_id, FIRST)
    upcoming = asyncio.ensure_future(anext(tail))
    busy = asyncio.get_running_loop().time() + 2.5
    while asyncio.get_running_loop().time() < busy:
        pond.feed._hear("*")
        await asyncio.sleep(0.01)
    assert 2 <= reads <= 12, "as often as others' runs change it would be 25 times"
    await pond.submit("echo", 1)
    async with asyncio.timeout(DEADLINE_S):
        await upcoming
    await tail.aclose()
    await db.close()


async def test_readers_that_go_on_by_place_miss_nothing_while_everybody_writes(pond: Pond) -> None:
    """Transactions of many lengths overlap; a reader that takes pages all the while gets every event once."""
    runs = [await pond.submit("echo", number) for number in range(8)]
    dice = random.Random(7)
    writing = 8

    async def write(run_id: uuid.UUID) -> None:
        nonlocal writing
        for number in range(12):
            async with pond.db.org(pond.org_id) as con:
                await append(con, pond.org_id, run_id, [Fact("progress", None, {"n": number})])
                await asyncio.sleep(dice.random() * 0.02)
        writing -= 1

    found: list[OrgEvent] = []

    async def follow() -> None:
        after = FIRST
        while True:
            done = writing == 0
            async with pond.db.org(pond.org_id) as con:
                page = await feeds.page(con, pond.org_id, after, limit=5)
            found.extend(page.events)
            after = page.reached
            if done and not page.has_more and len(found) >= 8 * 13:
                return
            await asyncio.sleep(0)

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(follow(), *(write(run_id) for run_id in runs))
    places = [(one.event.run_id, one.event.event_no) for one in found]
    assert len(places) == len(set(places)) == 8 * 13
    assert set(places) == {(run_id, number) for run_id in runs for number in range(1, 14)}


async def test_only_what_is_wanted_is_given_and_a_page_goes_on_behind_the_rest(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_SCAN", 5)
    pond.flow(echo)
    pond.flow(echo, name="other")
    async with pond.worker():
        runs = [await pond.submit(name, 1) for name in ("echo", "other") for _ in range(6)]
        for run_id in runs:
            await pond.ended(run_id)
    ends = Wanted(kinds=frozenset({"run.succeeded"}))
    found = await settled(pond, 12, wanted=ends)
    assert {one.event.kind for one in found} == {"run.succeeded"}
    mine = await read_all(pond, wanted=Wanted(kinds=ends.kinds, flow="other"), limit=2)
    assert {one.event.run_id for one in mine} == set(runs[6:])
    assert len(mine) == 6


async def test_now_is_the_place_after_all_that_is_over(pond: Pond) -> None:
    await pond.submit("echo", 1)
    await settled(pond, 1)
    async with pond.db.org(pond.org_id) as con:
        place = await feeds.now(con)
    assert await read_all(pond, place) == []
    later = await pond.submit("echo", 2)
    await settled(pond, 2)
    assert [one.event.run_id for one in await read_all(pond, place)] == [later]


async def test_a_page_reads_its_own_part_of_the_index(pond: Pond, admin_url: str) -> None:
    admin = await asyncpg.connect(admin_url)
    await admin.execute(
        "insert into millpond.event (org_id, run_id, event_no, kind, xid)"
        " select 1 + n % 50, gen_random_uuid(), 1, 'progress', (3 + n / 40)::text::xid8"
        " from generate_series(1, 20000) n"
    )
    await admin.execute("analyze millpond.event")
    await admin.close()
    async with pond.db.org(1) as con:
        rows = await con.fetch(
            "explain (analyze, buffers, costs off, timing off, format text) "
            + queries("feeds")["page"]
            .replace("$1", "1")
            .replace("$2", "'250'")
            .replace("$3", "'00000000-0000-0000-0000-000000000000'")
            .replace("$4", "0")
            .replace("$5", "20")
            .replace("$6", "null")
            .replace("$7", "null")
        )
    plan = "\n".join(row[0] for row in rows)
    assert "Index Scan using event_of_org" in plan, plan
    assert "xid >=" in plan.split("Index Cond:")[1].splitlines()[0], plan


@pytest.mark.parametrize(
    "text", ["", "x", "1", "1-2-3", f"{2**64}-{'0' * 32}-1", f"1-{'g' * 32}-1"]
)
def test_a_place_that_nobody_gave_out_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Place.read(text, param="after")
    place = Place(7, uuid.uuid4(), 3)
    assert Place.read(str(place), param="after") == place
