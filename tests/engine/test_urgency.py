"""Interactive work on a real database: found wherever its org stands, first to go, and no cost where there is none."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, orgs
from tests.engine.test_limits import limit, second_org

from millpond.engine.claim import Claimer
from millpond.engine.context import Context
from millpond.engine.registry import flow, step
from millpond.engine.submit import submit
from millpond.errors import InvalidInput
from millpond.types import INTERACTIVE, STANDARD, Intent, Urgency, lesser


async def put(pond: Pond, count: int, org_id: int, urgency: Urgency, **options: Any) -> None:
    intents = [
        pond.intent("echo", None, org_id=org_id, urgency=urgency, **options) for _ in range(count)
    ]
    async with pond.db.org(org_id) as con:
        await submit(con, intents)


async def stand(pond: Pond, org_id: int, virtual_s: float) -> None:
    """Let an org stand there in the fair order."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("update share set virtual_s = $2 where org_id = $1", org_id, virtual_s)


async def aged(pond: Pond, org_id: int) -> None:
    """Let all that is ready of an org have waited for a minute."""
    async with pond.engine_db.duty("test") as con:
        for sql in (
            "update ready set rank = rank - 60000000 where org_id = $1",
            "update item set rank = rank - 60000000 where org_id = $1 and state = 'queued'",
            "update lane set cursor_rank = cursor_rank - 60000000 where org_id = $1",
        ):
            await con.execute(sql, org_id)


async def arrive(pond: Pond, hand: Hand) -> None:
    """Let arrivals be read without anything going."""
    async with pond.engine_db.duty("test") as con:
        await con.fetch(
            "select * from claim_heads(5000, $1, '{default}', '{256}', '{}', 16)", uuid.uuid4()
        )


async def test_interactive_work_goes_first_wherever_its_org_stands(pond: Pond) -> None:
    """Also of an org that is not among those that come first by a claim for one slot."""
    others = [await second_org(pond.db) for _ in range(3)]
    hand = await Hand.register(pond)
    for org_id in others:
        await put(pond, 5, org_id, STANDARD)
    await put(pond, 3, pond.org_id, STANDARD)
    await put(pond, 3, pond.org_id, INTERACTIVE)
    await arrive(pond, hand)
    await stand(pond, pond.org_id, 20.0)
    went = [one for _ in range(4) for one in await hand.claim({"default": 1})]
    assert orgs(went) == [pond.org_id] * 3 + [min(others)]
    assert await pond.count("ready", f"org_id = {pond.org_id}") == 3


@pytest.mark.parametrize(("virtual_s", "lead_s"), [(40.0, 30.0), (20.0, 0.0)])
async def test_beyond_its_lead_an_org_goes_in_its_turn(
    pond: Pond, virtual_s: float, lead_s: float
) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond)
    hand.claimer = Claimer(
        pond.engine_db,
        worker_id=hand.claimer._worker_id,
        capabilities=["echo@1"],
        estimate_s=lambda _: 1.0,
        lead_s=lead_s,
    )
    await put(pond, 3, pond.org_id, INTERACTIVE)
    await put(pond, 3, other, STANDARD)
    await arrive(pond, hand)
    await stand(pond, pond.org_id, virtual_s)
    assert orgs(await hand.claim({"default": 1})) == [other]


async def test_of_an_org_standard_work_that_waited_long_has_every_second_turn(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await put(pond, 9, pond.org_id, STANDARD)
    await arrive(pond, hand)
    await aged(pond, pond.org_id)
    await put(pond, 9, pond.org_id, INTERACTIVE)
    went = [one.lease.item_id for _ in range(8) for one in await hand.claim({"default": 1})]
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select run_id, urgency from run where run_id = any($1)", went)
    urgency = {row["run_id"]: row["urgency"] for row in rows}
    assert [urgency[one] for one in went] == [INTERACTIVE, None] * 4


async def test_interactive_lanes_under_a_full_limit_are_taken_in_and_go(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    hand = await Hand.register(pond)
    await put(pond, 2, other, STANDARD, keys=[KEY])
    await put(pond, 2, pond.org_id, INTERACTIVE, keys=[KEY])
    assert orgs(await hand.soon()) == [pond.org_id]


async def test_lanes_of_different_classes_are_different_and_work_keeps_its_class(
    pond: Pond,
) -> None:
    async def naps(ctx: Context, _: Any) -> None:
        await ctx.sleep(0.01)
        await ctx.step(elsewhere)

    @step("elsewhere", queue="other", registry=pond.registry)
    async def elsewhere(_step: Any) -> None: ...

    made = pond.flow(naps, urgency=INTERACTIVE)
    async with pond.worker({"default": 4, "other": 4}):
        for urgency in (INTERACTIVE, STANDARD):
            run_id = await pond.submit(made, urgency=urgency)
            await pond.ended(run_id)
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select queue, count(*) filter (where offset_us & 1 = 1) as urgent,"
            " count(*) filter (where offset_us & 1 = 0) as standard from lane group by queue"
        )
    # New, resumed and (in the other queue) sent, each in a lane of its class.
    assert {row["queue"]: (row["urgent"], row["standard"]) for row in rows} == {
        "default": (2, 2),
        "other": (1, 1),
    }


async def test_a_child_is_interactive_where_its_flow_and_its_parent_are(pond: Pond) -> None:
    async def answer(_ctx: Context, _: Any) -> None: ...

    async def batch(_ctx: Context, _: Any) -> None: ...

    chat, plain = pond.flow(answer, urgency=INTERACTIVE), pond.flow(batch)

    async def parent(ctx: Context, _: Any) -> None:
        for child in (chat, plain, "answer", "batch"):
            await ctx.run_flow(child)
        await ctx.join(await ctx.start(chat, urgency=STANDARD))

    pond.flow(parent, urgency=INTERACTIVE)
    async with pond.worker():
        for urgency in (INTERACTIVE, STANDARD):
            await pond.ended(await pond.submit("parent", urgency=urgency))
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select p.urgency as of, r.flow, r.urgency from run r join run p on p.run_id = r.parent_id"
            " order by r.created_at, r.run_id"
        )
    found = [(row["of"], row["flow"], row["urgency"]) for row in rows]
    assert sorted(map(str, found)) == sorted(
        map(
            str,
            [
                *[(INTERACTIVE, "answer", INTERACTIVE)] * 2,
                (INTERACTIVE, "answer", None),
                *[(INTERACTIVE, "batch", None)] * 2,
                *[(None, "answer", None)] * 3,
                *[(None, "batch", None)] * 2,
            ],
        )
    )


async def test_without_interactive_work_no_lane_is_read_for_it(pond: Pond) -> None:
    await put(pond, 1, pond.org_id, STANDARD)
    intents: list[Intent] = [pond.intent("echo", None, keys=[f"nth:{nth}"]) for nth in range(3000)]
    async with pond.db.org(pond.org_id) as con:
        await submit(con, intents)
    await arrive(pond, await Hand.register(pond))
    read = (
        "select coalesce(sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = 'lane'"
    )
    async with pond.engine_db.duty("test") as con:
        await con.execute("select count(cursor_rank) from lane")
        before = await con.fetchval(read)
        assert before >= 3000, "such reads are counted"
        rows = await con.fetch("select * from claim_urgent('{default}', '{256}', '{echo@1}', 16)")
        assert (rows, await con.fetchval(read) - before) == ([], 0)


def test_a_flow_is_of_a_known_class(pond: Pond) -> None:
    with pytest.raises(InvalidInput):
        flow("odd", urgency="soon", registry=pond.registry)  # type: ignore[arg-type]
    assert [lesser(one, INTERACTIVE) for one in (STANDARD, INTERACTIVE)] == [STANDARD, INTERACTIVE]
