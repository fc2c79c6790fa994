"""Steps that wait beside working branches: no worker's claim lets later work take their places; on a real database."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any

import pytest
from tests.engine import parking
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, end, send
from tests.engine.test_limits import limit, second_org
from tests.engine.test_step_keys import OTHER, Gate, nothing_left, until

from millpond.engine import waits
from millpond.engine.context import Context
from millpond.engine.leases import Claimed, Seat
from millpond.engine.needs import Ask
from millpond.engine.operations import cancel
from millpond.engine.registry import Registry, step
from millpond.engine.resting import Rest, rest_alone
from millpond.engine.step_context import StepContext
from millpond.engine.submit import submit

ask_of = partial(parking.ask_of, is_beside=True)


async def rides(hand: Hand, *asks: Ask) -> list[bool]:
    """Let steps ride in a claim of a worker that has no free slot, as its loop does; tells which may begin."""
    await hand.claimer.claim({}, asks=asks)
    for ask in asks:
        ask.since_us = hand.claimer.answers[ask].since_us or ask.since_us
    return [hand.claimer.answers[ask].is_seated for ask in asks]


async def begun(pond: Pond, hand: Hand, count: int = 1, **options: Any) -> list[Claimed]:
    """Let a worker have runs that have no key under a limit."""
    await send(pond, count, keys=["nth:run"], **options)
    return await hand.claim({"default": count})


async def holding(pond: Pond, hand: Hand, count: int = 1) -> list[Claimed]:
    """Let a worker have runs that hold the key."""
    await send(pond, count)
    return await hand.claim({"default": count})


async def in_one_lane(pond: Pond, count: int) -> None:
    """Submit runs that have the key, all in one lane."""
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("echo", None, keys=[KEY, "nth:lane"]) for _ in range(count)])


async def test_later_work_of_another_worker_does_not_pass_a_step_that_waits(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    await send(pond, 2)
    assert await others.soon() == []
    await end(pond, held)
    assert await others.soon() == [], "its place is left for it"
    assert others.claimer.summons == {mine.worker_id}
    assert await pond.count("step_lease", "since_us is null") == 0, "in a claim of its worker alone"
    assert await rides(mine, ask) == [True]
    assert await others.soon() == []
    assert not others.claimer.summons
    await end(pond, [run])
    assert len(await others.soon()) == 1


async def test_work_that_stood_in_line_before_a_step_goes_before_it(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    await send(pond, 1)
    assert await others.soon() == []
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    await send(pond, 1)
    await end(pond, held)
    assert await rides(mine, ask) == [False], "the other worker has a slot for what came first"
    first = await others.soon()
    assert len(first) == 1
    await end(pond, first)
    assert await others.soon() == [], "what came after it"
    assert await rides(mine, ask) == [True]


async def test_work_that_came_before_and_whose_lane_is_not_looked_at_goes_first_too(
    pond: Pond,
) -> None:
    """Three items of one lane stood before the step, and three places come free at once."""
    await limit(pond.db, KEY, 3)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others, 3)
    await in_one_lane(pond, 3)
    assert await others.soon() == []
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    await end(pond, held)
    assert await rides(mine, ask) == [False], "three stood before it, and have slots elsewhere"
    assert len(await others.soon()) == 3


async def test_a_step_that_needs_more_than_is_left_holds_up_nobody(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    runs = await begun(pond, mine, 2)
    assert await rides(mine, ask_of(runs[0], OTHER)) == [True]
    ask = ask_of(runs[1], KEY, OTHER)
    assert await rides(mine, ask) == [False]
    await send(pond, 1)
    later = await others.soon()
    assert len(later) == 1, "it has the one key, and the step could not go"
    await end(pond, [runs[0]])
    assert await rides(mine, ask) == [False]
    await send(pond, 1)
    await end(pond, later)
    assert await others.soon() == []
    assert await rides(mine, ask) == [True], "all its keys at once"


async def test_an_org_that_has_had_less_of_the_queue_goes_before_a_step(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    await send(pond, 1, org_id=other)
    assert await others.soon() == []
    async with pond.engine_db.duty("test") as con:
        await con.execute("update share set virtual_s = 50.0 where org_id = $1", pond.org_id)
        await con.execute("update share set virtual_s = 20.0 where org_id = $1", other)
    await end(pond, held)
    (later,) = await others.soon()
    assert later.lease.org_id == other
    async with pond.engine_db.duty("test") as con:
        await con.execute("update share set virtual_s = 80.0 where org_id = $1", other)
    await send(pond, 1, org_id=other)
    await end(pond, [later])
    assert await others.soon() == []
    assert await rides(mine, ask) == [True]


async def test_many_waiting_steps_of_an_org_hide_no_younger_one_of_another(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 0)
    hand = await Hand.register(pond)
    (run,) = await begun(pond, hand)
    (younger,) = await begun(pond, hand, org_id=other)
    assert await rides(hand, ask_of(run), ask_of(younger)) == [False, False]
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into step_lease (org_id, item_id, step_key, token, keys, since_us) "
            "select org_id, item_id, 'more:' || n, token, keys, since_us - n "
            "from step_lease, generate_series(1, 1500) n where org_id = $1",
            pond.org_id,
        )
        rows = await con.fetch("select org_id, us, room from claim_seated() where kind = 'asked'")
    assert [row["org_id"] for row in rows] == [pond.org_id] * 32 + [other]
    assert [row["us"] for row in rows] == sorted(row["us"] for row in rows)
    assert rows[0]["room"] == f"{run.lease.item_id} more:1500"


async def test_a_place_is_left_no_longer_than_its_holder_lives(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    assert await rides(mine, ask_of(run)) == [False]
    await send(pond, 1)
    await end(pond, held)
    assert await others.soon() == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update worker set expires_at = clock_timestamp() where worker_id = $1",
            mine.worker_id,
        )
    assert len(await others.soon()) == 1


async def test_the_end_of_its_lease_takes_a_step_out_of_line(pond: Pond) -> None:
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    assert await rides(mine, ask_of(run)) == [False]
    await send(pond, 1)
    await end(pond, [*held, run])
    assert len(await others.soon()) == 1
    assert not others.claimer.summons


async def test_what_a_rate_lets_go_is_left_for_a_step_and_not_spent_meanwhile(pond: Pond) -> None:
    await limit(pond.db, KEY, 1, kind="rate", period_s=60.0, burst=1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    assert len(await holding(pond, others)) == 1
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    await send(pond, 1)
    assert await others.soon() == []
    assert not others.claimer.summons
    async with pond.engine_db.duty("test") as con:  # as after a minute
        await con.execute("update meter set tat_us = 1")
        await con.execute("update room set due_us = 1")
    assert await others.soon() == []
    assert others.claimer.limits.poll_s(1.0, 1.0) > 0.1, "nobody claims all the time meanwhile"
    assert others.claimer.summons
    assert await rides(mine, ask) == [True], "what was left is there"


async def test_a_step_is_in_everybodys_sight_only_while_it_waits_beside_branches(
    pond: Pond,
) -> None:
    """One whose run goes to wait at once stands in line there: no row is written for it."""
    await limit(pond.db, KEY, 1)
    hand = await Hand.register(pond)
    (run,) = await begun(pond, hand)
    await holding(pond, hand)
    ask = ask_of(run, is_beside=False)
    assert await rides(hand, ask) == [False]
    assert await pond.count("step_lease") == 0
    assert await rides(hand, ask) == [False]
    assert await pond.count("step_lease", "since_us is not null") == 1, "it rides on, so it waits"
    since_us = ask.since_us
    asks = {ask.step_key: ask}
    rest = Rest(lease=run.lease, step_keys=[ask.step_key], is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    assert await pond.count("step_lease") == 0
    assert await pond.count("step_need", f"rank = {since_us} + 1") == 1, "its place is the same"


async def test_a_step_whose_run_goes_on_for_another_branch_keeps_its_place_in_line(
    pond: Pond,
) -> None:
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    ask = ask_of(run)
    assert await rides(mine, ask) == [False]
    first_us = ask.since_us
    asks = {ask.step_key: ask}
    rest = Rest(lease=run.lease, step_keys=[ask.step_key], is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    await send(pond, 1)
    async with pond.engine_db.duty("test") as con:
        await waits.ready(con, [waits.Wake(org_id=run.lease.org_id, run_id=run.lease.run_id)])
    (again,) = await mine.claim({"default": 1})
    assert again.lease.run_id == run.lease.run_id
    anew = ask_of(again)
    assert await rides(mine, anew) == [False]
    assert anew.since_us == (first_us or 0) + 1
    await end(pond, held)
    assert await others.soon() == [], "it still stands before what came later"
    assert await rides(mine, anew) == [True]


async def test_what_was_kept_for_a_step_in_line_is_its_own_when_it_asks_again(pond: Pond) -> None:
    """Its run goes on for another branch, while a place is kept for it under one of its keys."""
    await limit(pond.db, KEY, 1)
    await limit(pond.db, OTHER, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    ask = ask_of(run, KEY, OTHER)
    assert await rides(mine, ask) == [False]
    asks = {ask.step_key: ask}
    rest = Rest(lease=run.lease, step_keys=[ask.step_key], is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    assert await mine.soon() == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set blocked_at = blocked_at - interval '6 seconds' where blocked_at is not null"
        )
        await waits.ready(con, [waits.Wake(org_id=run.lease.org_id, run_id=run.lease.run_id)])
    (again,) = await mine.claim({"default": 1})
    await end(pond, held)
    assert await rides(mine, ask_of(again, KEY, OTHER)) == [True]


async def test_a_run_tells_since_when_the_steps_have_waited_that_it_is_claimed_for(
    pond: Pond,
) -> None:
    """So that one that comes too late for a rate asks again at its place."""
    await limit(pond.db, KEY, 0)
    hand = await Hand.register(pond)
    (run,) = await begun(pond, hand)
    ask = ask_of(run)
    assert await rides(hand, ask) == [False]
    asks = {ask.step_key: ask}
    rest = Rest(lease=run.lease, step_keys=[ask.step_key], is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    await limit(pond.db, KEY, 1)
    (again,) = await hand.soon()
    assert again.seats == (Seat(ask.step_key, (ask.since_us or 0) + 1),)


async def test_an_org_is_charged_once_for_a_run_that_is_taken_for_several_steps(
    pond: Pond,
) -> None:
    await limit(pond.db, KEY, 0)
    hand = await Hand.register(pond)
    (run,) = await begun(pond, hand)
    asks = {f"ask:{nth}": ask_of(run, key=f"ask:{nth}") for nth in range(3)}
    assert await rides(hand, *asks.values()) == [False] * 3
    rest = Rest(lease=run.lease, step_keys=list(asks), is_human=False, asks=asks)
    await rest_alone(pond.engine_db, rest)
    assert await hand.soon() == []
    before = await charged(pond)
    await limit(pond.db, KEY, 3)
    (again,) = await hand.soon()
    assert len(again.seats) == 3
    assert await charged(pond) == before + 1.0


async def charged(pond: Pond) -> float:
    async with pond.engine_db.duty("test") as con:
        found: float = await con.fetchval(
            "select virtual_s from share where org_id = $1", pond.org_id
        )
    return found


@pytest.mark.parametrize("count", [1, 3])
async def test_a_step_that_the_flow_gives_up_stands_in_line_no_more(pond: Pond, count: int) -> None:
    gate = Gate()

    async def gives_up(ctx: Context, _: Any) -> list[str]:
        async def asks(nth: int) -> str:
            try:
                async with asyncio.timeout(2.0):
                    return await ctx.step(f"ask {nth}", gate.stay, "never", keys=[KEY])
            except TimeoutError:
                return "gave up"

        branches = [asks(nth) for nth in range(count)]
        return list(await ctx.parallel(*branches, ctx.step("works", gate.stay, "works")))

    async def holds(ctx: Context, name: str) -> str:
        return await ctx.step("hold", gate.stay, name, keys=[KEY])

    flow, held = pond.flow(gives_up), pond.flow(holds)
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        await pond.submit(held, "held")
        await gate.reached("held")
        run_id = await pond.submit(flow)
        await gate.reached("works")
        await until(pond, "step_lease", "since_us is not null", count)
        await until(pond, "step_lease", "since_us is not null", 0)
        assert await pond.count("lease") == 2
        gate.open("held", "works")
        assert (await pond.ended(run_id))["output"] == ["gave up"] * count + ["works"]
        await nothing_left(pond)


async def test_over_two_workers_a_waiting_step_goes_before_what_came_after_it(pond: Pond) -> None:
    """With loops that claim by themselves: the step's worker has no free slot, the other one has many."""
    gate = Gate()
    order: list[str] = []

    async def forks(ctx: Context, name: str) -> None:
        await ctx.parallel(
            ctx.step("works", gate.stay, f"works {name}"),
            ctx.step("ask", asks, name, keys=[KEY]),
        )

    async def asks(name: str) -> None:
        order.append(name)
        await gate.stay(name)

    async def later(ctx: Context, name: str) -> None:
        await asks(name)

    mine, others = pond.flow(forks), pond.flow(later, keys=[KEY])
    await limit(pond.db, KEY, 1)
    async with (
        pond.worker({"default": 2}, flows=[mine]),
        pond.worker({"default": 8}, flows=[others]),
    ):
        await pond.submit(others, "first")
        await gate.reached("first")
        runs: list[uuid.UUID] = []
        for name in ("a", "b"):
            runs.append(await pond.submit(mine, name))
            await gate.reached(f"works {name}")
            await until(pond, "step_lease", "since_us is not null", len(runs))
        for nth in range(4):
            runs.append(await pond.submit(others, f"later {nth}"))
        await until(pond, "ready", count=4)
        await until(pond, "lane", "parked_on is not null and not active")
        gate.open("first", "a", "b", *(f"later {nth}" for nth in range(4)))
        await gate.reached("later 3")
        gate.open("works a", "works b")
        for run_id in runs:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await nothing_left(pond)
    assert order == ["first", "a", "b", *(f"later {nth}" for nth in range(4))]


async def test_a_place_in_line_of_nobody_is_taken_out_by_its_worker(pond: Pond) -> None:
    """Its step was given up and the database did not hear of that; the run goes on."""
    await limit(pond.db, KEY, 1)
    mine, others = await Hand.register(pond), await Hand.register(pond)
    (run,) = await begun(pond, mine)
    held = await holding(pond, others)
    assert await rides(mine, ask_of(run)) == [False]
    await send(pond, 1)
    await end(pond, held)
    assert await others.soon() == []
    assert others.claimer.summons == {mine.worker_id}
    assert await mine.claim({"default": 1}) == []
    assert not mine.claimer.summons, "it has heard of it itself"
    assert await pond.count("step_lease") == 0
    assert len(await others.soon()) == 1


async def test_a_step_that_was_cancelled_keeps_no_place_while_its_run_undoes_what_it_did(
    pond: Pond,
) -> None:
    gate = Gate()

    @step("act", registry=Registry())
    async def act(step_ctx: StepContext, what: str) -> str:
        return what

    @step("undo", registry=Registry())
    async def undo(step_ctx: StepContext, what: str) -> None:
        await gate.stay(what)

    async def both(ctx: Context, _: Any) -> None:
        await ctx.step(act, "act", undo=undo)
        await ctx.parallel(
            ctx.step("work", gate.stay, "work"), ctx.step("ask", gate.stay, "ask", keys=[OTHER])
        )

    flow = pond.flow(both)
    await limit(pond.db, OTHER, 0)
    async with pond.worker({"default": 2}):
        run_id = await pond.submit(flow)
        await until(pond, "step_lease", "since_us is not null")
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")
        pond.hints.cancelled([run_id])
        await gate.reached("act")
        await until(pond, "step_lease", "true", 0)
        assert await pond.count("lease") == 1
        gate.open("act")
        assert (await pond.ended(run_id))["outcome"] == "cancelled"


async def test_a_branch_without_a_place_in_its_bound_leaves_its_room_to_others(pond: Pond) -> None:
    """Its place was given to the next branch as it parked; it asks anew once it has one."""
    gate = Gate()

    async def maps(ctx: Context, _: Any) -> list[str]:
        return await ctx.map(
            lambda name: ctx.step(name, gate.stay, name, keys=[KEY] if name == "asks" else []),
            ["asks", "works"],
            limit=1,
        )

    async def asks(ctx: Context, name: str) -> str:
        return await ctx.step("ask", gate.stay, name, keys=[KEY])

    mapping, asking = pond.flow(maps, name="maps"), pond.flow(asks, name="asks")
    await limit(pond.db, KEY, 1)
    async with pond.worker({"default": 4}):
        first = await pond.submit(asking, "first")
        await gate.reached("first")
        run_id = await pond.submit(mapping)
        await gate.reached("works")
        await until(pond, "step_lease", "since_us is not null")
        second = await pond.submit(asking, "second")
        await until(pond, "step_need")
        gate.open("first")
        await gate.reached("second")
        assert "asks" not in gate.inside
        gate.open("works", "asks")
        await until(pond, "step_lease", "since_us is not null")
        gate.open("second")
        await pond.ended(run_id)
        for one in (first, second):
            await pond.ended(one)
        await nothing_left(pond)
