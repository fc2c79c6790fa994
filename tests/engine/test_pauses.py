"""Pauses: what is paused stands queued and goes on when it is resumed; nobody else notices."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.claim import Claimer
from millpond.engine.context import Context
from millpond.engine.leases import Claimed
from millpond.engine.pauses import Scope, list_pauses, pause, resume
from millpond.engine.submit import submit
from millpond.errors import NotFound

QUEUE, FLOW, ORG = Scope(queue="default"), Scope(flow="echo"), Scope()
EVERYONE = Scope(queue="default", is_for_everyone=True)


async def echo(ctx: Context, given: Any) -> Any:
    return given


async def other(ctx: Context, given: Any) -> Any:
    return given


async def hold(pond: Pond, scope: Scope, org_id: int | None = None) -> None:
    async with pond.db.org(org_id or pond.org_id) as con:
        await pause(con, org_id or pond.org_id, scope, "user:ann", "repairs")


async def let_go(pond: Pond, scope: Scope, org_id: int | None = None) -> list[str]:
    async with pond.db.org(org_id or pond.org_id) as con:
        resumed = await resume(con, org_id or pond.org_id, scope)
    pond.hints.wake(resumed.queues)
    assert resumed.was_paused
    return list(resumed.queues)


class Hand:
    """Claims by hand, as a worker that has the flows echo and other."""

    def __init__(self, pond: Pond, claimer: Claimer) -> None:
        self.pond = pond
        self.claimer = claimer

    @classmethod
    async def register(cls, pond: Pond) -> Hand:
        worker_id = uuid.uuid4()
        able = ["echo@1", "other@1", "echo@1!"]
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                queries("maintenance")["register_worker"],
                worker_id,
                "here",
                1,
                '{"default": 8, "llm": 8}',
                able,
                600.0,
                "",
                "{}",
            )
        claimer = Claimer(
            pond.engine_db, worker_id=worker_id, capabilities=able, estimate_s=lambda _: 1.0
        )
        return cls(pond, claimer)

    async def claim(self, slots: int = 8, queue: str = "default") -> list[Claimed]:
        claimed, _ = await self.claimer.claim({queue: slots})
        return claimed

    async def orgs(self, slots: int = 8) -> list[int]:
        return [one.lease.org_id for one in await self.claim(slots)]


@pytest.mark.parametrize("scope", [QUEUE, FLOW, ORG, EVERYONE])
async def test_what_is_paused_waits_and_goes_on_when_resumed(pond: Pond, scope: Scope) -> None:
    pond.flow(echo)
    async with pond.worker():
        first = await pond.submit("echo", 1)
        await pond.ended(first)
        await hold(pond, scope)
        held = await pond.submit("echo", 2)
        free = await pond.submit("echo", 3, queue="llm")
        async with pond.worker({"llm": 1}):
            if scope in (FLOW, ORG):
                assert await pond.kinds(free) == ["run.queued"]
            else:
                await pond.ended(free)
        assert await pond.kinds(held) == ["run.queued"]
        await let_go(pond, scope)
        assert (await pond.ended(held))["output"] == 2


async def test_running_work_goes_on_and_what_it_waited_for_stands_queued(pond: Pond) -> None:
    may_go = asyncio.Event()

    async def slow(ctx: Context, _: None) -> str:
        await may_go.wait()
        return "done"

    async def nap(ctx: Context, _: None) -> str:
        await ctx.sleep(1.1)
        return "awake"

    pond.flow(slow)
    pond.flow(nap)
    async with pond.worker():
        slow_id, nap_id = await pond.submit("slow"), await pond.submit("nap")
        await pond.until(slow_id, "run.started")
        await pond.until(nap_id, "run.waiting")
        await hold(pond, ORG)
        may_go.set()
        assert (await pond.ended(slow_id))["output"] == "done"
        await pond.until(nap_id, "sleep.ended")
        assert await pond.count("item", "state = 'queued'") == 1
        await let_go(pond, ORG)
        assert (await pond.ended(nap_id))["output"] == "awake"


async def test_one_flow_is_paused_beside_another(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await hold(pond, FLOW)
    await pond.submit("echo")
    await pond.submit("other")
    assert [one.flow for one in await hand.claim()] == ["other"]
    assert await hand.claim() == []
    await let_go(pond, FLOW)
    assert [one.flow for one in await hand.claim()] == ["echo"]


async def test_a_flow_whose_name_begins_with_that_of_a_paused_one_goes_on(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await hold(pond, Scope(flow="ech"))
    await hold(pond, Scope(flow="oth"))
    await pond.submit("echo")
    assert len(await hand.claim()) == 1


async def test_other_orgs_go_on_unless_the_operator_pauses_for_everyone(
    pond: Pond, other_org: int
) -> None:
    hand = await Hand.register(pond)
    await hold(pond, QUEUE)
    await pond.submit("echo")
    await pond.submit("echo", org_id=other_org)
    assert await hand.orgs() == [other_org]
    await let_go(pond, QUEUE)
    await hold(pond, EVERYONE)
    await pond.submit("echo", org_id=other_org)
    assert await hand.orgs() == []
    await let_go(pond, EVERYONE)
    assert sorted(await hand.orgs()) == sorted([pond.org_id, other_org])


async def test_paused_orgs_do_not_use_up_the_orgs_that_a_claim_reads(
    pond: Pond, other_org: int
) -> None:
    hand = await Hand.register(pond)
    await pond.submit("echo", org_id=other_org)
    await pond.submit("echo")
    assert len(await hand.claim()) == 2
    await pond.submit("echo")
    await pond.submit("echo", org_id=other_org)
    await hold(pond, ORG)
    assert await hand.orgs(slots=1) == [other_org]


async def test_a_pause_gives_no_credit_for_the_time_it_lasted(pond: Pond, other_org: int) -> None:
    hand = await Hand.register(pond)
    for org_id in (pond.org_id, other_org):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent("echo", n, org_id=org_id) for n in range(60)])
    await hand.orgs()
    await hold(pond, ORG)
    for _ in range(5):
        assert set(await hand.orgs()) == {other_org}
    await let_go(pond, ORG)
    for _ in range(3):
        orgs = await hand.orgs()
        assert abs(orgs.count(pond.org_id) - orgs.count(other_org)) <= 2


async def test_of_two_pauses_each_holds_until_it_is_lifted(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await pond.submit("echo")
    await hold(pond, QUEUE)
    await hold(pond, FLOW)
    assert await hand.claim() == []
    await let_go(pond, QUEUE)
    assert await hand.claim() == []
    await let_go(pond, FLOW)
    assert len(await hand.claim()) == 1


async def test_work_that_arrives_while_an_org_is_being_resumed_is_not_forgotten(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await hold(pond, ORG)
    await pond.submit("echo")
    async with pond.db.org(pond.org_id) as con:
        await resume(con, pond.org_id, ORG)  # sees no lane: none has been made yet
        assert await hand.claim() == []  # makes the lane, and sees the pause
    assert len(await hand.claim()) == 1


async def test_a_claim_never_waits_for_somebody_who_pauses_or_resumes(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await pond.submit("other")
    await hold(pond, FLOW)
    async with pond.db.org(pond.org_id) as con:
        await resume(con, pond.org_id, FLOW)
        await pause(con, pond.org_id, ORG, "user:ann", "")
        async with asyncio.timeout(5):
            assert len(await hand.claim()) == 1


async def test_pausing_and_resuming_twice_is_no_error(pond: Pond) -> None:
    pond.flow(echo)
    async with pond.db.org(pond.org_id) as con:
        await pond.submit("echo")
        first = await pause(con, pond.org_id, QUEUE, "user:ann", "first")
        assert await pause(con, pond.org_id, QUEUE, "user:bob", "second") == first
        assert (await resume(con, pond.org_id, QUEUE)).was_paused
        assert not (await resume(con, pond.org_id, QUEUE)).was_paused


async def test_a_queue_that_nobody_knows_is_refused(pond: Pond, other_org: int) -> None:
    await pond.submit("echo", queue="theirs", org_id=other_org)
    for scope in (Scope(queue="nowhere"), Scope(queue="theirs")):
        with pytest.raises(NotFound):
            await hold(pond, scope)


async def test_an_org_sees_its_own_pauses_and_those_for_everyone(
    pond: Pond, other_org: int
) -> None:
    await pond.submit("echo")
    for scope in (QUEUE, FLOW, ORG, EVERYONE):
        await hold(pond, scope)
    async with pond.db.org(pond.org_id) as con:
        assert {one.scope for one in await list_pauses(con, pond.org_id)} == {
            QUEUE,
            FLOW,
            ORG,
            EVERYONE,
        }
    async with pond.db.org(other_org) as con:
        assert [one.scope for one in await list_pauses(con, other_org)] == [EVERYONE]


async def _read(con: Connection) -> Counter[str]:
    """Return what this transaction has read so far: scans and rows of each table."""
    rows = await con.fetch(
        "select relname, seq_scan, idx_scan, coalesce(idx_tup_fetch, 0) as fetched"
        " from pg_stat_xact_user_tables"
    )
    counts = ("seq_scan", "idx_scan", "fetched")
    return Counter({f"{row['relname']} {what}": row[what] or 0 for row in rows for what in counts})


async def _read_by_heads(con: Connection) -> Counter[str]:
    """Return what the claim's first statement reads: the least of three times, since planning it reads too."""
    least: Counter[str] | None = None
    for _ in range(3):
        before = await _read(con)
        await con.fetch(
            queries("claim")["heads"], 100, uuid.uuid4(), ["default"], [2], ["echo@1"], 16
        )
        found = await _read(con)
        found.subtract(before)
        least = found if least is None else least & found
    assert least is not None
    return least


@pytest.mark.parametrize("has_pauses", [False, True])
async def test_the_claim_reads_by_key_and_looks_no_pause_up_without_any(
    pond: Pond, other_org: int, has_pauses: bool
) -> None:
    hand = await Hand.register(pond)
    for org_id in (pond.org_id, other_org):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent("echo", n, org_id=org_id) for n in range(2000)])
    await hand.claim(slots=2)
    if has_pauses:
        await hold(pond, QUEUE)
    async with pond.engine_db.duty("explain") as con:
        seen = await _read_by_heads(con)
    for table in ("lane", "ready", "share"):
        assert seen[f"{table} idx_scan"] > 0
        assert seen[f"{table} seq_scan"] == 0
        assert seen[f"{table} fetched"] <= 100  # of 4,000 that wait
    # Each table is asked once whether it holds anything: two scans of its index.
    assert seen["queue_pause idx_scan"] <= 2
    assert (seen["pause idx_scan"] > 2) == has_pauses
