"""Steps that ride in rooms that several queues need, on a real database: in turn, charged, settled by their time."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import KEY, ROOM, Hand, end, send
from tests.engine.test_limits import limit, second_org
from tests.engine.test_step_keys import until
from tests.engine.test_turns import QUEUES, many, stands
from tests.engine.test_waiters import ask_of, rides

from millpond.engine import crossings
from millpond.engine.branches import Branches
from millpond.engine.charges import Charges, Toll
from millpond.engine.context import Context
from millpond.engine.leases import Claimed, Lease, Seat
from millpond.engine.needs import Ask
from millpond.engine.resting import Rest, rest_alone
from millpond.engine.riding import Riding
from millpond.engine.seating import Seating
from millpond.engine.submit import submit
from millpond.engine.tolls import Tolls
from millpond.engine.why import explain
from millpond.engine.why_queued import Reason


async def begun(pond: Pond, hand: Hand, count: int = 1, **options: Any) -> list[Claimed]:
    """Let a worker have runs of queue llm that have no key under a limit."""
    await send(pond, count, keys=["nth:run"], queue="llm", **options)
    return await hand.claim({"llm": count})


async def put(pond: Pond, **at_s: float) -> None:
    """Let orgs stand there in the crossing: `of_<id>`."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("update crossing set virtual_s = 0")
        for name, virtual_s in at_s.items():
            await con.execute(
                "insert into crossing_share values ($1, $2, $3) on conflict (org_id, room)"
                " do update set virtual_s = excluded.virtual_s",
                *(int(name.removeprefix("of_")), ROOM, virtual_s),
            )


async def crossed(
    pond: Pond, hand: Hand, other: int, steps: int = 1
) -> tuple[list[Ask], list[Claimed]]:
    """Let steps of the first org stand in line, and runs of another in the other queue behind them."""
    await limit(pond.db, KEY, 1)
    runs = await begun(pond, hand, steps)
    await many(pond, "sql", other, 1)
    held = await hand.claim({"sql": 8})
    asks = [ask_of(one, key=f"ask:{nth}") for nth, one in enumerate(runs)]
    assert await rides(hand, *asks) == [False] * steps
    await many(pond, "sql", other, 6)
    assert await hand.claim({"sql": 8}) == []
    await rides(hand, *asks)
    return asks, held


async def test_a_step_and_runs_of_another_queue_make_a_room_a_crossing(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    asks, _ = await crossed(pond, hand, other)
    assert await pond.count("crossing") == 1
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from room")
    assert not await crossings.drop_over(pond.engine_db), "the step stands there"
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from step_lease")
    assert await crossings.drop_over(pond.engine_db) == 1
    assert asks[0].since_us is not None


async def test_steps_of_one_queue_alone_make_no_crossing(pond: Pond) -> None:
    await limit(pond.db, KEY, 0)
    hand = await Hand.register(pond, queues=QUEUES)
    (run,) = await begun(pond, hand)
    for _ in range(3):
        assert await rides(hand, ask_of(run)) == [False]
    assert await pond.count("crossing") == 0


async def test_a_step_that_came_first_waits_for_an_org_that_has_used_less(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    asks, held = await crossed(pond, hand, other)
    await put(pond, **{f"of_{pond.org_id}": 20.0, f"of_{other}": 10.0})
    await end(pond, held)
    claimed, _ = await hand.claimer.claim({"sql": 8}, asks=asks)
    assert [one.lease.org_id for one in claimed] == [other]
    assert not hand.claimer.answers[asks[0]].is_seated
    await put(pond, **{f"of_{other}": 30.0})
    await end(pond, claimed)
    claimed, _ = await hand.claimer.claim({"sql": 8}, asks=asks)
    assert claimed == []
    assert hand.claimer.answers[asks[0]].is_seated


async def test_a_step_that_has_just_come_goes_before_an_org_that_has_used_more(
    pond: Pond,
) -> None:
    """At once: it is not refused first, for the sake of runs that wait."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    _, held = await crossed(pond, hand, other)
    (run,) = await begun(pond, hand)
    for mine_s, has_room in ((2.0, False), (0.0, True)):
        async with pond.engine_db.duty("test") as con:
            await con.execute("delete from step_lease")
        await put(pond, **{f"of_{pond.org_id}": mine_s, f"of_{other}": 1.0})
        await end(pond, held)
        ask = ask_of(run, key=f"new:{has_room}")
        held, _ = await hand.claimer.claim({"sql": 8}, asks=[ask])
        assert hand.claimer.answers[ask].is_seated is has_room
        assert len(held) == 1 - has_room


async def test_a_step_that_came_later_goes_before_an_org_that_has_used_more(pond: Pond) -> None:
    other = await second_org(pond.db)
    await limit(pond.db, KEY, 1)
    hand = await Hand.register(pond, queues=QUEUES)
    (run,) = await begun(pond, hand)
    await many(pond, "sql", other, 6)
    held = await hand.claim({"sql": 8})
    ask = ask_of(run)
    assert await rides(hand, ask) == [False]
    await rides(hand, ask)
    await put(pond, **{f"of_{pond.org_id}": 10.0, f"of_{other}": 20.0})
    await end(pond, held)
    claimed, _ = await hand.claimer.claim({"sql": 8}, asks=[ask])
    assert claimed == []
    assert hand.claimer.answers[ask].is_seated


async def test_a_try_is_charged_by_an_estimate_in_the_claim_that_lets_it_begin(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    asks, held = await crossed(pond, hand, other)
    await put(pond, **{f"of_{pond.org_id}": 5.0, f"of_{other}": 10.0})
    await end(pond, held)
    assert await rides(hand, *asks) == [True]
    assert hand.claimer.answers[asks[0]].toll == Toll("llm", (ROOM,), 1.0, "echo@1")
    assert await stands(pond) == {pond.org_id: 6.0, other: 10.0}


async def test_many_steps_of_an_org_side_by_side_gain_nothing(pond: Pond) -> None:
    """Six of its branches wait beside one lane of the other org: they take turns."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    asks, held = await crossed(pond, hand, other, steps=6)
    went: Counter[int] = Counter()
    for _ in range(8):
        await end(pond, held)
        held, _ = await hand.claimer.claim({"sql": 8}, asks=asks)
        went.update(one.lease.org_id for one in held)
        for ask in [one for one in asks if hand.claimer.answers[one].is_seated]:
            asks.remove(ask)
            went[ask.org_id] += 1
            async with pond.engine_db.duty("test") as con:
                await con.execute("delete from step_lease where step_key = $1", ask.step_key)
    assert sum(went.values()) == 8
    assert abs(went[pond.org_id] - went[other]) <= 1


async def test_a_step_of_a_waiting_run_is_charged_for_its_try_and_not_for_its_run(
    pond: Pond,
) -> None:
    """Its run may go on for an hour after it."""
    other = await second_org(pond.db)
    done = asyncio.Event()

    async def asks(ctx: Context, _: Any) -> None:
        await ctx.step("ask", asyncio.sleep, 0.01, keys=[KEY])
        await asyncio.sleep(1.5)

    async def work(_ctx: Context, _: Any) -> None:
        await done.wait()

    asking, working = pond.flow(asks, name="asks"), pond.flow(work, name="works", keys=[KEY])
    await limit(pond.db, KEY, 1)
    async with pond.worker({"llm": 4, "sql": 4}):
        await _one(pond, working, other, "sql")
        await until(pond, "lease")
        run_id = await _one(pond, asking, pond.org_id, "llm")
        await until(pond, "step_need")
        await _one(pond, working, other, "sql")
        await until(pond, "crossing")
        async with pond.engine_db.duty("test") as con:
            began_s = await con.fetchval("select virtual_s from crossing")
        done.set()
        await pond.ended(run_id)
        assert 0 < (await stands(pond))[pond.org_id] - began_s < 1.2, "its run takes 1.5 s at least"


async def test_lines_of_steps_wake_by_what_their_tries_use_and_not_by_their_runs(
    pond: Pond,
) -> None:
    """The next places are those of the org that will have used less by then, though its runs are long."""
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES, estimate_s=lambda _: 10.0, try_s=lambda _: 0.25)
    await limit(pond.db, KEY, 3)
    await many(pond, "sql", other, 3)
    held = await hand.claim({"sql": 8})
    assert len(held) == 3
    runs = await begun(pond, hand, 3)
    for run in runs:
        ask = ask_of(run)
        assert await rides(hand, ask) == [False]
        asks = {ask.step_key: ask}
        rest = Rest(lease=run.lease, step_keys=list(asks), is_human=False, asks=asks)
        await rest_alone(pond.engine_db, rest)
    await many(pond, "sql", other, 6)
    assert await hand.claim(dict.fromkeys(QUEUES, 8)) == []
    await put(pond, **{f"of_{pond.org_id}": 0.0, f"of_{other}": 1.0})
    await end(pond, held)
    went = await hand.claim(dict.fromkeys(QUEUES, 8))
    assert [one.lease.org_id for one in went] == [pond.org_id] * 3
    assert (await stands(pond))[pond.org_id] == pytest.approx(0.75)


async def test_a_try_whose_claims_answer_was_lost_owes_what_that_had_charged(pond: Pond) -> None:
    """Whatever was learned meanwhile: else its settlement gives back, or charges, what was never charged."""
    other, expected_s = await second_org(pond.db), [0.5]
    hand = await Hand.register(pond, queues=QUEUES, try_s=lambda _: expected_s[0])
    asks, held = await crossed(pond, hand, other)
    await put(pond, **{f"of_{pond.org_id}": 0.0, f"of_{other}": 1.0})
    await end(pond, held)
    assert await rides(hand, *asks) == [True]
    assert (await stands(pond))[pond.org_id] == pytest.approx(0.5)
    expected_s[0] = 7.0
    await hand.claimer.claim({})
    await hand.claimer.claim({}, asks=asks)
    answer = hand.claimer.answers[asks[0]]
    assert answer.is_seated
    assert answer.toll is not None
    assert answer.toll.charged_s == 0.5
    assert (await stands(pond))[pond.org_id] == pytest.approx(0.5)


async def _one(pond: Pond, flow: Any, org_id: int, queue: str) -> uuid.UUID:
    intent = pond.intent(flow, 1, org_id=org_id, queue=queue)
    async with pond.db.org(org_id) as con:
        await submit(con, [intent])
    return intent.run_id


async def test_why_tells_the_turn_of_a_step_beside_its_run_and_of_a_parked_run(pond: Pond) -> None:
    other = await second_org(pond.db)
    hand = await Hand.register(pond, queues=QUEUES)
    asks, _ = await crossed(pond, hand, other)
    async with pond.engine_db.duty("test") as con:
        parked = await con.fetchval("select item_id from ready where org_id = $1 limit 1", other)
    for mine_s, of_step, of_run in ((20.0, 1, 0), (5.0, 0, 1)):
        await put(pond, **{f"of_{pond.org_id}": mine_s, f"of_{other}": 10.0})
        (running,) = await _why(pond, pond.org_id, asks[0].item_id)
        (room,) = running.inner
        (full,) = room.inner
        assert (running.kind, room.kind, full.kind) == ("running", "room", "limit")
        assert room.facts["step"] == "ask:0"
        assert full.facts["turn"] == of_step
        assert f", up to {of_step} organizations that have used less go before" in running.text
        full, _ = await _why(pond, other, parked)
        assert full.facts["turn"] == of_run


async def test_why_claims_no_use_of_a_room_under_which_only_steps_stand(pond: Pond) -> None:
    hand = await Hand.register(pond, queues=QUEUES)
    asks, _ = await crossed(pond, hand, await second_org(pond.db))
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from room")
    (running,) = await _why(pond, pond.org_id, asks[0].item_id)
    ((full,),) = [room.inner for room in running.inner]
    assert f"{KEY} may have no room, or give it to others first" in full.text
    assert full.facts["in_use"] is None
    assert "turn" in full.facts


async def _why(pond: Pond, org_id: int, run_id: uuid.UUID) -> Sequence[Reason]:
    async with pond.db.org(org_id) as con:
        return (await explain(con, org_id, run_id)).reasons


@pytest.mark.parametrize("is_beside", [False, True])
async def test_workers_share_a_key_between_steps_and_runs_of_two_queues(
    pond: Pond, is_beside: bool
) -> None:
    """One org uses it by steps of its runs, one after the other or side by side, the other by whole runs."""
    other = await second_org(pond.db)
    step_s, run_s = 0.02, 0.06
    used: Counter[int] = Counter()

    async def hold(org_id: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        used[org_id] += round(seconds * 1000)

    async def asks(ctx: Context, org_id: int) -> None:
        def step(nth: int) -> Any:
            return ctx.step(f"ask {nth}", hold, org_id, step_s, keys=[KEY])

        if is_beside:
            await ctx.parallel(*(step(nth) for nth in range(8)))
            return
        for nth in range(8):
            await step(nth)

    async def work(_ctx: Context, org_id: int) -> None:
        await hold(org_id, run_s)

    asking, working = pond.flow(asks, name="asks"), pond.flow(work, name="works", keys=[KEY])
    await limit(pond.db, KEY, 3)
    for org_id, flow, queue, count in (
        (pond.org_id, asking, "llm", 60),
        (other, working, "sql", 200),
    ):
        async with pond.db.org(org_id) as con:
            intents = [pond.intent(flow, org_id, org_id=org_id, queue=queue) for _ in range(count)]
            await submit(con, intents)
    async with pond.worker({"llm": 8, "sql": 6}):
        async with asyncio.timeout(60):
            while sum(used.values()) < 9000 and used[pond.org_id] < 8000 and used[other] < 8000:
                await asyncio.sleep(0.01)
        mine, theirs = used[pond.org_id], used[other]
    assert mine / 2 <= theirs <= 2 * mine


def test_what_a_try_used_is_settled_once_and_what_never_began_is_given_back() -> None:
    charges, learned = Charges(), dict[str, float]()
    tolls = Tolls(charges, learned.__setitem__)
    claimed = _claimed(Seat("came", 1, _toll(0.0)), Seat("never", 2, _toll(7.0)))
    lease = claimed.lease
    tolls.begin(lease, "came", _toll(0.0))
    tolls.begin(lease, "other", _toll(5.0))
    tolls.end(lease, "other")
    tolls.end(lease, "other")
    assert not learned, "what was cut short tells nothing of how long it takes"
    tolls.over(claimed._replace(lease=lease._replace(token=uuid.UUID(int=2)), seats=()))
    assert not charges.is_idle, "another attempt of it has nothing of this one"
    tolls.over(claimed)
    owed = charges.take_crossed()
    assert owed == {(1, "llm", ROOM): pytest.approx(-12.0, abs=0.5)}
    assert charges.is_idle
    tolls.begin(lease, "last", _toll(0.0))
    tolls.end(lease, "last", is_whole=True)
    assert learned.keys() == {"echo@1"}
    assert charges.take_ended(0.0) == {}, "its attempt's time is charged in the queue"


async def test_room_that_a_bound_lets_not_be_used_is_given_back_with_what_it_cost(
    pond: Pond,
) -> None:
    charges = Charges()
    tolls = Tolls(charges, lambda _work, _used_s: None)
    claimed = _claimed(Seat("~0.0/ask:0", 1, _toll(0.0)), Seat("~0.1/ask:0", 2, _toll(7.0)))
    riding = Riding(pond.engine_db, tolls=tolls)
    branches = Branches(asyncio.get_running_loop())
    seating = Seating(claimed.lease, riding, branches, seats=claimed.seats)
    assert branches.seats is seating
    seating.give_back(["~0.1/ask:0"])
    assert set(seating.keys) == {"~0.0/ask:0"}
    assert charges.take_crossed() == {(1, "llm", ROOM): pytest.approx(-7.0, abs=0.5)}
    await riding.close()
    tolls.over(claimed)
    assert charges.take_crossed() == {}, "once"
    assert charges.is_idle


def _toll(charged_s: float) -> Toll:
    return Toll("llm", (ROOM,), charged_s, "echo@1")


def _claimed(*seats: Seat) -> Claimed:
    run_id = uuid.UUID(int=1)
    return Claimed(
        Lease(1, run_id, run_id, 1, run_id),
        deaths=0,
        tries=1,
        cancel_requested=False,
        flow="echo",
        version=1,
        queue="llm",
        input=None,
        subject="",
        timeout_s=None,
        seats=seats,
    )
