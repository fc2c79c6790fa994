"""Tokens of steps' own keys on a real database: reserved with their room, settled by themselves, counted once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, ask_of, end, rooms
from tests.engine.test_limits import limit, over, second_org, submit_many
from tests.engine.test_step_keys import Gate, in_line, nothing_left, staying, until
from tests.engine.test_tokens import METER, left, need
from tests.engine.test_tokens import tokens as limit_tokens

from millpond.db.queries import queries
from millpond.engine import metering, riding, why
from millpond.engine.batches import StepWrite
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.counting import NEVER
from millpond.engine.keying import check_keys
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.needs import Ask
from millpond.engine.operations import cancel
from millpond.engine.registry import step
from millpond.engine.storing import record
from millpond.errors import InvalidInput, Transient
from millpond.retry import Retry

OTHER = "provider:other"
OTHERS = f"tokens 0 0 {OTHER}"
# No key that is limited.
ALONE = "thing:alone"


async def tokens(pond: Pond, maximum: int, burst: int | None = None, **options: Any) -> None:
    """Limit tokens per day, so that none come back while a test looks."""
    await limit_tokens(pond, maximum, burst, period_s=86_400.0, **options)


def asks(
    claimed: Claimed,
    key: str = "ask:0",
    *keys: str,
    needs: int | None = 300,
    since: int | None = None,
) -> Ask:
    """Make a step of a claimed run ask for room."""
    return ask_of(claimed, *check_keys(keys or [KEY], tokens=needs), key=key, since_us=since)


async def ride(hand: Hand, *asked: Ask, free: int = 0) -> list[bool]:
    """Let steps ride in one claim; returns which of them may begin."""
    for _ in range(3):
        await hand.claimer.claim({"default": free} if free else {}, asks=asked)
        if all(one in hand.claimer.answers for one in asked):
            break
    return [hand.claimer.answers[one].is_seated for one in asked]


async def begun(pond: Pond, hand: Hand, *keys: str) -> Claimed:
    """Claim a run with these keys."""
    await need(pond, None, keys=list(keys or [ALONE]))
    (claimed,) = await hand.soon()
    return claimed


def spent(ask: Ask, count: int, model: str = "one:m", **options: Any) -> Spent:
    carried = tuple(key for key in ask.keys if key.startswith(("provider:", "model:")))
    return Spent(
        model, count - count // 3, count // 3, step_key=ask.step_key, carried=carried, **options
    )


async def recorded(pond: Pond, claimed: Claimed, ask: Ask, *told: Spent) -> None:
    """Let a try be over as its record does that: what it used and its room in one transaction."""
    async with pond.engine_db.duty("test") as con:
        await metering.store(con, [(claimed.lease, one) for one in told])
        await con.execute(
            queries("needs")["leave"],
            *([ask.org_id], [ask.item_id], [ask.token], [ask.step_key]),
        )


async def given_up(pond: Pond, ask: Ask, *, is_untold: bool) -> None:
    """Let a try be over of which nothing is recorded."""
    async with pond.engine_db.duty("test") as con:
        own = ask.org_id, ask.item_id, ask.token, ask.step_key
        await con.execute(queries("needs")["give_up"], *own, is_untold)


async def rescued(pond: Pond, *claimed: Claimed) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            queries("maintenance")["unlease"],
            [one.lease.org_id for one in claimed],
            [one.lease.item_id for one in claimed],
            [one.lease.token for one in claimed],
            [None] * len(claimed),
        )


async def reserved(pond: Pond) -> list[tuple[str, str, int, int]]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select room, step_key, tokens, used from reservation order by room, step_key, tokens"
        )
    return [tuple(row) for row in rows]


async def test_a_try_reserves_what_its_step_needs_beside_its_run_and_the_rest_waits(
    pond: Pond,
) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    tries = [asks(run, f"ask:{nth}", needs=400) for nth in range(3)]
    assert await ride(hand, *tries) == [True, True, False]
    assert await reserved(pond) == [(METER, "ask:0", 400, 0), (METER, "ask:1", 400, 0)]
    assert await left(pond, 1000) == 200


async def test_a_recorded_try_is_settled_by_what_it_used_while_its_run_goes_on(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    first, second, third = (asks(run, f"ask:{nth}", needs=450) for nth in range(3))
    assert await ride(hand, first, second) == [True, True]
    await recorded(pond, run, first, spent(first, 90))
    await recorded(pond, run, second, spent(second, 1400))
    # 90 of 450 and 1,400 of 450: what was used beyond is owed.
    assert await ride(hand, third) == [False]
    assert await left(pond, 1000) == 1000 - 90 - 1400
    assert await reserved(pond) == []
    assert await pond.count("lease_use") == 0


async def test_of_many_needs_the_smallest_are_looked_at_for_who_stands_before(pond: Pond) -> None:
    """So many distinct needs bound what a claim reads, however many an org has."""
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    holding = asks(run, "holding:0", needs=990)
    assert await ride(hand, holding) == [True]
    for count in range(20, 60):
        await need(pond, count)
    assert await hand.soon() == []
    async with pond.engine_db.duty("test") as con:
        names = "select count(distinct parked_on) from lane where parked_on like 'tokens%'"
        assert await con.fetchval(names) == 40
        statement = queries("needs")["elders_of_tokens"]
        rows = await con.fetch(statement, [METER], hand.worker_id, ["default"], 8, [58])
        assert sorted(row["need"] for row in rows) == list(range(20, 52))
        assert all(len(row["ranks"]) == 1 for row in rows)
        rows = await con.fetch(statement, [METER], hand.worker_id, ["default"], 8, [30])
        assert sorted(row["need"] for row in rows) == list(range(20, 31))


@pytest.mark.parametrize("is_old", [False, True])
async def test_a_need_beyond_the_smallest_ones_is_passed_only_until_it_has_waited_long(
    pond: Pond, is_old: bool
) -> None:
    """Who asks beside its run does not see it among what stands before; what is kept for it is not taken."""
    await tokens(pond, 4000)
    other = await second_org(pond.db)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    holding = asks(run, "holding:0", needs=3990)
    assert await ride(hand, holding) == [True]
    for count in range(20, 52):
        await need(pond, count)
    await need(pond, 60, org_id=other)
    assert await hand.soon() == []
    await recorded(pond, run, holding, spent(holding, 4000 - 1240))
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update worker set queues = '{\"default\": 64}', in_use = '{\"default\": 0}'"
        )
        if is_old:
            await con.execute(
                "update lane set blocked_at = blocked_at - interval '6 seconds' where org_id = $1",
                other,
            )
    # Those of the 32 smallest that could go now need 1136 of 1240; the last one needs 60.
    assert sum(range(20, 52)) == 1136
    riding = await Hand.register(pond, queues=("other",))
    assert await ride(riding, asks(run, "small:0", needs=100)) == [not is_old]
    if is_old:
        await hand.soon()
        assert (METER, "", 60, 0) in await reserved(pond)


async def test_all_keys_of_all_kinds_or_none(pond: Pond) -> None:
    await tokens(pond, 1000)
    await limit(pond.db, OTHER, 1)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    tries = [asks(run, f"ask:{nth}", KEY, OTHER) for nth in range(2)]
    assert await ride(hand, *tries) == [True, False]
    assert await left(pond, 1000) == 700
    assert await pond.count("step_lease") == len(await reserved(pond)) == 1


async def test_what_the_run_has_reserved_is_not_reserved_twice_and_tells_what_the_step_used(
    pond: Pond,
) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand, KEY, "tokens:600")
    ask = asks(run)
    assert await ride(hand, ask) == [True]
    assert await reserved(pond) == [(METER, "", 600, 0)]
    await recorded(pond, run, ask, spent(ask, 90))
    await hand.soon()
    assert await reserved(pond) == [(METER, "", 600, 90)]
    await end(pond, [run])
    await hand.soon()
    assert await left(pond, 1000) == 910


async def test_each_use_belongs_to_the_step_where_that_has_reserved_else_to_the_run(
    pond: Pond,
) -> None:
    await tokens(pond, 10_000)
    await tokens(pond, 10_000, key=OTHER)
    await tokens(pond, 10_000, key="org:*")
    all_work = f"tokens 0 {pond.org_id} "
    hand = await Hand.register(pond)
    run = await begun(pond, hand, KEY, "tokens:100")
    of_other, again, of_both = (
        asks(run, "other:0", OTHER, needs=200),
        asks(run, "again:0", OTHER, needs=300),
        asks(run, "both:0", KEY, OTHER, needs=400),
    )
    assert await ride(hand, of_other, again, of_both) == [True] * 3
    told = [
        spent(of_other, 1, "other:m"),
        spent(again, 10, "other:m"),
        spent(of_both, 100, "one:m"),
        # Nobody's key: what the step counts on it is.
        spent(of_other, 1000, "unheard-of"),
        # Not of the step's own keys, and the run has it.
        spent(again, 10_000, "one:m"),
        # Of a step without keys of its own.
        Spent("other:m", 100_000, 0),
    ]
    async with pond.engine_db.duty("test") as con:
        await metering.store(con, [(run.lease, one) for one in told])
    await hand.soon()
    assert await reserved(pond) == [
        (METER, "", 100, 110_100),
        (OTHERS, "again:0", 300, 10),
        (OTHERS, "both:0", 400, 0),
        (OTHERS, "other:0", 200, 1001),
        (all_work, "", 100, 111_111),
    ]


async def test_a_rescue_lets_the_estimates_of_tries_under_way_stand_and_settles_recorded_ones(
    pond: Pond,
) -> None:
    await tokens(pond, 10_000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    over_, told, quiet = (asks(run, f"{name}:0", needs=300) for name in ("over", "told", "quiet"))
    assert await ride(hand, over_, told, quiet) == [True] * 3
    await recorded(pond, run, over_, spent(over_, 20))
    async with pond.engine_db.duty("test") as con:
        await metering.store(con, [(run.lease, spent(told, 350))])
    await rescued(pond, run)
    # Upkeep may come before the claim that settles: it leaves what that has to know.
    await riding.sweep(pond.engine_db)
    await hand.soon()
    assert await left(pond, 10_000) == 10_000 - 20 - 350 - 300
    assert await reserved(pond) == []
    await riding.sweep(pond.engine_db)
    assert await pond.count("step_lease") == 0


async def test_of_a_call_that_was_cut_off_the_steps_estimate_stands_and_not_the_runs(
    pond: Pond,
) -> None:
    await tokens(pond, 1000)
    await tokens(pond, 1000, key=OTHER)
    hand = await Hand.register(pond)
    run = await begun(pond, hand, OTHER, "tokens:200")
    ask = asks(run, needs=300)
    assert await ride(hand, ask) == [True]
    await recorded(pond, run, ask, spent(ask, 0, is_cut=True))
    await end(pond, [run])
    await hand.soon()
    assert (await left(pond, 1000), await left(pond, 1000, OTHERS)) == (700, 1000)


async def test_a_handed_back_lease_settles_its_tries_by_what_they_told(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    first, second = asks(run, "first:0"), asks(run, "second:0")
    assert await ride(hand, first, second) == [True, True]
    async with pond.engine_db.duty("test") as con:
        cut = spent(second, 0, is_cut=True)
        await metering.store(con, [(run.lease, spent(first, 40)), (run.lease, cut)])
    await end(pond, [run])
    await hand.soon()
    assert await left(pond, 1000) == 1000 - 40 - 300


async def test_a_refused_record_gives_nothing_back(pond: Pond) -> None:
    """Its lease is gone by a rescue: what the try had reserved stands."""
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    ask = asks(run)
    assert await ride(hand, ask) == [True]
    await rescued(pond, run)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update item set token = gen_random_uuid() where item_id = $1", run.lease.item_id
        )
        write = StepWrite(
            lease=run.lease,
            step_key=ask.step_key,
            name="ask",
            event_kind="step.succeeded",
            event_data="{}",
            state="done",
            output="1",
            has_room=True,
        )
        assert await record(con, [(1, write)]) == {}
    assert await pond.count("step_lease") == 1
    await hand.soon()
    assert await left(pond, 1000) == 700


async def test_an_earlier_waiter_that_could_go_is_not_passed(pond: Pond) -> None:
    """A lane waits under the limit, its worker has a free slot: what it needs is left to it."""
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    holding = asks(run, "holding:0", needs=800)
    assert await ride(hand, holding) == [True]
    await need(pond, 500)
    await need(pond, 990)
    assert await hand.soon() == []
    await recorded(pond, run, holding, spent(holding, 200))
    small, large = asks(run, "small:0", needs=300), asks(run, "large:0", needs=400)
    # 800 are left: 500 of them for the lane that could go now, none for the one that could not.
    async with pond.engine_db.duty("test") as con:
        await con.execute("update worker set in_use = '{\"default\": 0}'")
    other = await Hand.register(pond, queues=("other",))
    assert await ride(other, large, small) == [False, True]
    (got,) = await hand.soon()
    assert await reserved(pond) == [(METER, "", 500, 0), (METER, "small:0", 300, 0)]
    assert got.lease.item_id != run.lease.item_id


async def test_tokens_are_kept_for_a_step_that_waits_beside_its_run_for_long(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    holding = asks(run, "holding:0", needs=600)
    assert await ride(hand, holding) == [True]
    old = asks(run, "old:0", needs=900, since=1)
    assert await ride(hand, old) == [False]
    await need(pond, 300)
    assert await hand.soon() == [], "what is left is kept"
    await recorded(pond, run, holding, spent(holding, 50))
    assert await ride(hand, old) == [True]
    assert await left(pond, 1000) == 50


async def test_what_declares_nothing_needs_a_thousand_and_then_what_such_tries_used(
    pond: Pond,
) -> None:
    await tokens(pond, 100_000)
    await tokens(pond, 700, key=OTHER)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    first = asks(run, "first:0", needs=None)
    capped = asks(run, "capped:0", OTHER, needs=None)
    assert await ride(hand, first, capped) == [True, True]
    assert await reserved(pond) == [(METER, "first:0", 1000, 0), (OTHERS, "capped:0", 700, 0)]
    await recorded(pond, run, first, spent(first, 5_120))
    assert await ride(hand, second := asks(run, "second:0", needs=None)) == [True]
    assert (METER, second.step_key, 5200, 0) in await reserved(pond)


async def test_where_no_tokens_are_limited_nothing_is_written_of_them(pond: Pond) -> None:
    await limit(pond.db, KEY, 2)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    ask = asks(run)
    assert await ride(hand, ask) == [True]
    await recorded(pond, run, ask, spent(ask, 20))
    assert await pond.count("reservation") == await pond.count("lease_use") == 0
    assert await pond.count("meter") == 0


# With workers


async def only_reserved(pond: Pond, expected: list[tuple[str, str, int, int]]) -> None:
    """Wait until claims have let go of what ended work had reserved."""
    async with asyncio.timeout(20):
        while len(await reserved(pond)) > len(expected):
            pond.hints.wake(["default"])
            await asyncio.sleep(0.05)
    assert await reserved(pond) == expected


async def settled(pond: Pond) -> None:
    """Wait until nothing is reserved any more."""
    async with asyncio.timeout(20):
        while await pond.count("reservation") or await pond.count("lease_use"):
            pond.hints.wake(["default"])
            await asyncio.sleep(0.05)


def asking(pond: Pond, gate: Gate, *, needs: int | None = 300, **options: Any) -> Any:
    """Register a flow whose one step stays at the gate under its input's name, and then tells what it used."""

    async def ask(step: StepContext, name: str, count: int) -> str:
        await gate.stay(name)
        step.spend("one:m", input_tokens=count, output_tokens=0)
        return name

    asked = pond.step(ask, keys=[KEY], tokens=needs)

    async def asks_once(ctx: Context, given: list[Any]) -> str:
        return await ctx.step(asked, *given)

    return pond.flow(asks_once, **options)


async def test_tries_of_two_workers_are_settled_by_what_they_tell(pond: Pond) -> None:
    async def ask(step: StepContext, count: int) -> None:
        step.spend("one:m", input_tokens=count, output_tokens=1)

    asked = pond.step(ask, keys=[KEY], tokens=300)

    async def answer(ctx: Context, count: int) -> None:
        await ctx.parallel(ctx.step(asked, count), ctx.step(asked, count))
        await ctx.step(asked, count)

    flow = pond.flow(answer)
    # No more than five at once, and more than a third of all only as it is settled.
    await tokens(pond, 1000, 1500)
    async with pond.worker({"default": 4}), pond.worker({"default": 4}):
        await submit_many(pond, flow, 4, 99)
        await over(pond, flow, 4)
        await settled(pond)
        await nothing_left(pond)
    # 100 each, 12 of them.
    assert await left(pond, 1500) == 300


async def test_a_step_in_line_takes_its_own_need_and_its_run_that_of_its_flow(pond: Pond) -> None:
    gate = Gate()
    flow = asking(pond, gate, needs=600, keys=[OTHER], tokens=70)
    await tokens(pond, 1000)
    await tokens(pond, 1000, key=OTHER)
    async with pond.worker({"default": 4}):
        first = await pond.submit(flow, ["first", 50])
        await gate.reached("first")
        assert await reserved(pond) == [(METER, "ask:0", 600, 0), (OTHERS, "", 70, 0)]
        second = await pond.submit(flow, ["second", 60])
        await in_line(pond, second)
        await until(pond, "room", f"room = 'tokens:600 0 0 {KEY}'")
        async with pond.db.org(pond.org_id) as con:
            told = await why.explain(con, pond.org_id, second)
        (reason,) = told.reasons
        assert reason.text.startswith(f"Step ask waits for room on {KEY}. ")
        assert (reason.kind, reason.facts["keys"], reason.facts["tokens"]) == ("room", [KEY], 600)
        (full,) = [one for one in reason.inner if one.kind == "limit"]
        assert (full.facts["key"], full.facts["tokens"], full.facts["left"]) == (KEY, 600, 400)
        assert full.text.startswith(f"{KEY} has too few tokens: needs 600, 400 left, the next at ")
        gate.open("first")
        await gate.reached("second")
        # What the first run has of its own goes with its end, which may come after that.
        assert (await pond.ended(first))["output"] == "first"
        await only_reserved(pond, [(METER, "ask:0", 600, 0), (OTHERS, "", 70, 0)])
        gate.open("second")
        assert (await pond.ended(second))["output"] == "second"
        await settled(pond)
        await nothing_left(pond)
    assert (await left(pond, 1000), await left(pond, 1000, OTHERS)) == (890, 1000)


async def test_two_branches_have_reservations_of_their_own_and_one_waits_for_the_other(
    pond: Pond,
) -> None:
    gate = Gate()

    async def ask(step: StepContext, name: str) -> str:
        await gate.stay(name)
        step.spend("one:m", input_tokens=100, output_tokens=0)
        return name

    asked = pond.step(ask, keys=[KEY], tokens=600)

    async def forks(ctx: Context, _: Any) -> list[str]:
        return list(await ctx.parallel(ctx.step(asked, "one"), ctx.step(asked, "two")))

    flow = pond.flow(forks)
    await tokens(pond, 1000)
    async with pond.worker({"default": 4}):
        run_id = await pond.submit(flow)
        await gate.reached("one")
        await asyncio.sleep(0.3)
        assert gate.inside == {"one"}
        gate.open("one")
        await gate.reached("two")
        assert await left(pond, 1000) == 300
        gate.open("two")
        assert (await pond.ended(run_id))["output"] == ["one", "two"]
        await settled(pond)
    assert await left(pond, 1000) == 800


async def test_each_try_reserves_anew_and_is_settled_by_itself(pond: Pond) -> None:
    seen: list[list[tuple[str, str, int, int]]] = []

    async def ask(step: StepContext) -> None:
        seen.append(await reserved(pond))
        step.spend("one:m", input_tokens=10 * step.try_number, output_tokens=0)
        if step.try_number < 3:
            raise Transient("not yet", retry_after_s=(0.05, 1.5)[step.try_number - 1])

    asked = pond.step(ask, keys=[KEY], tokens=300, retry=Retry(max_tries=3))

    async def answer(ctx: Context, _: Any) -> None:
        await ctx.step(asked)

    flow = pond.flow(answer)
    await tokens(pond, 1000)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await pond.until(run_id, "step.retrying", nth=2)
        await settled(pond)
        assert await left(pond, 1000) == 970
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
        await settled(pond)
    assert seen == [[(METER, "ask:0", 300, 0)]] * 3
    assert await left(pond, 1000) == 940


@pytest.mark.parametrize("queue", ["default", "elsewhere"])
async def test_a_step_that_could_never_begin_fails_at_once(pond: Pond, queue: str) -> None:
    async def ask(_: StepContext) -> str:
        return "done"

    asked = pond.step(ask, keys=[KEY], tokens=1100, queue=queue)

    async def answer(ctx: Context, _: Any) -> str:
        try:
            return await ctx.step(asked)
        except StepFailed as error:
            return f"{error.code}: {error.message}"

    flow = pond.flow(answer)
    await tokens(pond, 1000)
    async with pond.worker({"default": 2, "elsewhere": 1}):
        run_id = await pond.submit(flow)
        told = (await pond.ended(run_id))["output"]
        assert told.startswith("tokens_above_limit: step ask needs 1,100 tokens, and ")
        assert f"{KEY} never has more than 1,000 at once" in told
        assert (await pond.kinds(run_id)).count("step.failed") == 1
        await tokens(pond, 1000, 1100)
        assert (await pond.ended(await pond.submit(flow)))["output"] == "done"
        await nothing_left(pond)


async def test_a_step_in_another_queue_reserves_its_own_need_in_place_of_its_runs(
    pond: Pond,
) -> None:
    gate = Gate()

    async def ask(step: StepContext) -> str:
        await gate.stay("there")
        step.spend("one:m", input_tokens=40, output_tokens=0)
        return "done"

    asked = pond.step(ask, keys=[KEY], tokens=300, queue="elsewhere")

    async def answer(ctx: Context, _: Any) -> str:
        return await ctx.step(asked)

    flow = pond.flow(answer, tokens=70)
    await tokens(pond, 1000)
    async with pond.worker({"default": 2, "elsewhere": 1}):
        run_id = await pond.submit(flow)
        await gate.reached("there")
        assert await reserved(pond) == [(METER, "", 300, 0)]
        gate.open("there")
        assert (await pond.ended(run_id))["output"] == "done"
        await settled(pond)
    assert await left(pond, 1000) == 960


async def test_a_limit_lowered_below_the_need_of_a_step_in_line_lets_it_wait_and_why_says_so(
    pond: Pond,
) -> None:
    gate = Gate()
    flow = asking(pond, gate, needs=600)
    await tokens(pond, 1000)
    async with pond.worker({"default": 4}):
        await pond.submit(flow, ["first", 50])
        await gate.reached("first")
        second = await pond.submit(flow, ["second", 60])
        await in_line(pond, second)
        await tokens(pond, 1000, 500)
        async with asyncio.timeout(10):
            while [one[3] for one in await rooms(pond)] != [NEVER]:
                pond.hints.wake(["default"])
                await asyncio.sleep(0.05)
        async with pond.db.org(pond.org_id) as con:
            text = (await why.explain(con, pond.org_id, second)).text
        assert f"{KEY} never has the 600 tokens that it needs" in text
        gate.open("first", "second")
        await tokens(pond, 1000, 1200)
        assert (await pond.ended(second))["output"] == "second"
        await settled(pond)


async def test_a_cancel_settles_a_cut_call_at_its_estimate_and_the_rest_by_what_was_told(
    pond: Pond,
) -> None:
    gate = Gate()

    async def cut(step: StepContext) -> None:
        try:
            await gate.stay("cut")
        finally:
            step.spend_unknown("one:m")

    async def tells(step: StepContext) -> None:
        step.spend("one:m", input_tokens=25, output_tokens=0)
        await gate.stay("tells")

    one, other = pond.step(cut, keys=[KEY], tokens=300), pond.step(tells, keys=[KEY], tokens=200)

    async def answer(ctx: Context, _: Any) -> None:
        await ctx.parallel(ctx.step(one), ctx.step(other))

    flow = pond.flow(answer)
    await tokens(pond, 1000)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await gate.reached("cut")
        await gate.reached("tells")
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, subject="user:test")
        pond.hints.cancelled([run_id])
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
        await settled(pond)
        await nothing_left(pond)
    assert await left(pond, 1000) == 1000 - 300 - 25


async def test_a_drain_hands_back_what_a_step_had_reserved_but_what_it_told(pond: Pond) -> None:
    gate = Gate()

    async def ask(step: StepContext) -> str:
        step.spend("one:m", input_tokens=25, output_tokens=0)
        return await gate.stay("stays")

    asked = pond.step(ask, keys=[KEY], tokens=300)

    async def answer(ctx: Context, _: Any) -> str:
        return await ctx.step(asked)

    flow = pond.flow(answer)
    await tokens(pond, 1000)
    async with pond.worker(drain_s=0.2):
        run_id = await pond.submit(flow)
        await gate.reached("stays")
    gate.open("stays")
    async with pond.worker():
        assert (await pond.ended(run_id))["output"] == "stays"
        await settled(pond)
    assert await left(pond, 1000) == 950


async def test_what_a_flows_own_time_limit_cut_short_is_settled_as_its_attempt_ends(
    pond: Pond,
) -> None:
    """Its place is free at once; what it used and could not tell belongs to its reservation all the same."""
    gate, limits = Gate(), []

    async def ask(step: StepContext) -> None:
        step.spend("one:m", input_tokens=500, output_tokens=0)
        limits[-1].reschedule(asyncio.get_running_loop().time())
        await gate.stay("slow")

    asked = pond.step(ask, keys=[KEY, OTHER], tokens=300)

    async def answer(ctx: Context, _: Any) -> str:
        try:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await ctx.step(asked)
        except TimeoutError:
            return await ctx.step("then", gate.stay, "then")
        return "never"

    flow, others = pond.flow(answer), staying(pond, gate, OTHER)
    await tokens(pond, 1000)
    await limit(pond.db, OTHER, 1)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await gate.reached("then")
        other = await pond.submit(others, "beside")
        await gate.reached("beside")
        assert await reserved(pond) == [(METER, "ask:0", 300, 0)]
        gate.open("then", "beside")
        assert (await pond.ended(run_id))["output"] == "then"
        assert (await pond.ended(other))["output"] == "beside"
        await settled(pond)
    assert await left(pond, 1000) == 500


async def test_what_a_given_up_try_has_reserved_stays_while_its_step_waits_again(
    pond: Pond,
) -> None:
    """Until its use is told: also when it stands in everybody's sight, and when it stands there no more."""
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    first, other = asks(run), asks(run, "other:0", needs=600)
    assert await ride(hand, first, other) == [True, True]
    await given_up(pond, first, is_untold=True)
    again = asks(run, since=1)
    assert await ride(hand, again) == [False]
    async with pond.engine_db.duty("test") as con:
        since = "select since_us from step_lease where step_key = $1"
        assert await con.fetchval(since, first.step_key) == 1
    await hand.soon()
    assert await left(pond, 1000) == 100
    await given_up(pond, again, is_untold=False)
    await hand.soon()
    assert (METER, "ask:0", 300, 0) in await reserved(pond)
    async with pond.engine_db.duty("test") as con:
        await metering.store(con, [(run.lease, spent(first, 250))])
    await end(pond, [run])
    await hand.soon()
    assert (await left(pond, 1000), await reserved(pond)) == (750, [])


async def test_a_claim_does_not_wait_for_the_lock_of_who_gives_up_a_try(pond: Pond) -> None:
    await tokens(pond, 1000)
    hand = await Hand.register(pond)
    run = await begun(pond, hand)
    first, other = asks(run), asks(run, "other:0", needs=600)
    assert await ride(hand, first, other) == [True, True]
    await given_up(pond, first, is_untold=True)
    again = asks(run, since=1)
    since = "select since_us from step_lease where step_key = $1"
    async with pond.engine_db.duty("test") as con:
        own = again.org_id, again.item_id, again.token, again.step_key, True
        await con.execute(queries("needs")["give_up"], *own)
        # With that transaction open: its claims end all the same.
        assert await ride(hand, again) == [False]
        assert await con.fetchval(since, again.step_key) is None
    assert await ride(hand, again) == [False]
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchval(since, again.step_key) == 1


async def test_tokens_of_a_step_are_of_its_keys(pond: Pond) -> None:
    with pytest.raises(InvalidInput, match="tokens are of its keys, and it has none"):
        step("asks", tokens=5)(_nothing)

    async def answer(ctx: Context, given: list[Any]) -> str:
        keys, count = given
        return await ctx.step("ask", _nothing_at_all, keys=keys, tokens=count)

    flow = pond.flow(answer)
    await tokens(pond, 1000)
    async with pond.worker():
        assert (await pond.ended(await pond.submit(flow, [[KEY], 300])))["output"] == "done"
        ended = await pond.ended(await pond.submit(flow, [[], 300]))
        assert (ended["outcome"], ended["error"]["code"]) == ("failed", "invalid_input")
        ended = await pond.ended(await pond.submit(flow, [[KEY], 3000]))
        assert (ended["outcome"], ended["error"]["code"]) == ("failed", "tokens_above_limit")
        await settled(pond)
    assert await left(pond, 1000) == 1000


async def _nothing(_: StepContext) -> None: ...


async def _nothing_at_all() -> str:
    return "done"
