"""Orgs are charged the worker time that they used, whatever was expected of their runs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand, orgs
from tests.property.pond_checks import check_order

from millpond.engine.charges import EVERY_S, Charges
from millpond.engine.charging import settle
from millpond.engine.slots import Slots
from millpond.engine.submit import submit

LONG_S, SHORT_S = 0.1, 0.01


def test_what_was_expected_and_not_used_is_given_back() -> None:
    charges = Charges()
    use = charges.begin(1, "q", 2.0, began=100.0)
    charges.end(use, 0.5)
    assert charges.take(200.0) == {(1, "q"): pytest.approx(-1.5)}
    assert charges.take(300.0) == {}


def test_work_under_way_is_charged_as_it_goes_and_once() -> None:
    charges = Charges()
    use = charges.begin(1, "q", 1.0, began=100.0)
    assert charges.take(100.5) == {}, "what was expected is charged already"
    assert charges.take(103.0) == {(1, "q"): pytest.approx(2.0)}
    assert charges.take(104.0) == {(1, "q"): pytest.approx(1.0)}
    charges.end(use, 5.5)
    assert charges.take(110.0) == {(1, "q"): pytest.approx(1.5)}


def test_small_differences_add_up() -> None:
    charges = Charges()
    for _ in range(2):
        charges.end(charges.begin(1, "q", 0.002, began=0.0), 0.004)
    assert charges.take(1.0) == {}
    charges.end(charges.begin(1, "q", 0.002, began=0.0), 0.004)
    assert charges.take(2.0) == {(1, "q"): pytest.approx(0.006)}


def test_what_is_owed_may_be_left_until_it_is_much() -> None:
    charges = Charges()
    charges.end(charges.begin(1, "q", 1.0, began=0.0), 1.5)
    charges.end(charges.begin(2, "q", 1.0, began=0.0), 0.1)
    assert charges.take_ended(0.6) == {(2, "q"): pytest.approx(-0.9)}
    assert charges.take(2.0) == {(1, "q"): pytest.approx(0.5)}


def test_what_is_charged_is_what_the_claim_did_whatever_is_expected_by_its_start() -> None:
    slots = Slots({"q": 2})
    slot = slots.take("q", expected={"f@1": 2.0})
    slots.take("q").give_unused(2, "")
    for _ in range(50):
        learnt = slots.take("q")
        learnt.start(3, "f@1")
        learnt.give()
    assert slots.estimate_s("f@1") < 0.5
    slot.start(1, "f@1")
    slot.give()
    assert slots.charges.take(0.0)[1, "q"] == pytest.approx(-2.0, abs=0.5)


def test_what_was_never_begun_is_given_back() -> None:
    slots = Slots({"q": 1, "other": 1})
    slots.take("q", "other", expected={"f@1": 2.0}).give_unused(1, "f@1")
    assert slots.charges.take(0.0) == {(1, "q"): -2.0}
    assert slots.free() == {"q": 1, "other": 1}


def test_an_attempt_whose_end_is_being_stored_uses_nothing_until_there_is_more_to_execute() -> None:
    slots = Slots({"q": 1})
    slot = slots.take("q", expected={"f@1": 0.0})
    slot.start(1, "f@1")
    slot.hand_over()
    assert slots.charges.take(time.monotonic() + 100.0) == {}
    slot.take_again()
    assert slots.charges.take(time.monotonic() + 100.0) == {(1, "q"): pytest.approx(100.0, abs=5)}
    slot.give()
    assert slots.charges.take(time.monotonic()) == {(1, "q"): pytest.approx(-100.0, abs=5)}


async def test_a_claim_charges_by_one_expectation_and_tells_it(pond: Pond) -> None:
    """What is learned while it goes on changes nothing: in the end it is known what was charged."""
    guesses = iter(range(1, 100))
    hand = await Hand.register(pond, estimate_s=lambda _: float(next(guesses)))
    for keys in (["nth:1"], ["nth:2"]):
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [pond.intent("echo", n, keys=keys) for n in range(3)])
    assert len(await hand.claim({"default": 4})) == 4
    async with pond.engine_db.duty("test") as con:
        charged_s = await con.fetchval("select virtual_s from share")
    assert hand.claimer.expected == {"echo@1": charged_s / 4}


async def test_an_org_with_long_runs_gets_no_more_time_than_one_with_short_runs(
    pond: Pond, other_org: int
) -> None:
    """Of one flow, so that what is expected of a run is the same for both."""
    ended = {pond.org_id: 0, other_org: 0}

    async def work(ctx: Any, org_id: int) -> None:
        await asyncio.sleep(LONG_S if org_id == pond.org_id else SHORT_S)
        ended[org_id] += 1

    flow = pond.flow(work)
    for org_id, count in ((pond.org_id, 100), (other_org, 1000)):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent(flow, org_id, org_id=org_id) for _ in range(count)])
    async with pond.worker({"default": 4}):
        async with asyncio.timeout(40):
            while ended[other_org] < 300 and ended[pond.org_id] < 100:
                await asyncio.sleep(0.01)
        short_s, long_s = ended[other_org] * SHORT_S, ended[pond.org_id] * LONG_S
    # By count of runs alone the long ones would have ten times as much.
    bound_s = 5 * (LONG_S + SHORT_S) + 4 * EVERY_S
    assert abs(long_s - short_s) <= bound_s


async def test_an_org_that_is_due_all_of_a_claim_gets_all_of_it(pond: Pond, other_org: int) -> None:
    """Also after a claim for one slot, which had read little of each lane."""
    hand = await Hand.register(pond, estimate_s=lambda _: 0.01)
    for org_id in (pond.org_id, other_org):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent("echo", n, org_id=org_id) for n in range(50)])
    assert len(await hand.claim({"default": 2})) == 2
    async with pond.engine_db.duty("test") as con:
        await con.execute("update share set virtual_s = 100 where org_id = $1", other_org)
    assert orgs(await hand.claim({"default": 1})) == [pond.org_id]
    assert orgs(await hand.claim({"default": 12})) == [pond.org_id] * 12


@pytest.mark.parametrize(
    ("other_s", "other_waits", "clock_s"),
    [(430.0, False, 1.0), (430.0, True, 420.0), (0.0, True, 1.0), (50.0, True, 50.0)],
)
async def test_what_pushed_the_clock_and_is_given_back_takes_the_clock_back(
    pond: Pond, other_org: int, other_s: float, other_waits: bool, clock_s: float
) -> None:
    """As far as no other org that waits was charged more: whoever comes next starts there."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into fair_clock values ('default', 420.0)")
        await con.executemany(
            "insert into share (org_id, queue, virtual_s, active) values ($1, 'default', $2, $3)",
            [(pond.org_id, 480.0, True), (other_org, other_s, other_waits)],
        )
    await settle(pond.engine_db, {(pond.org_id, "default"): -479.0})
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchval("select virtual_s from fair_clock") == clock_s


@pytest.mark.parametrize("back_s", [10.0, 55.0, 470.0])
async def test_an_org_that_is_given_something_back_is_still_read(
    pond: Pond, other_org: int, back_s: float
) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into fair_clock values ('default', 460.0, 430.0)")
        await con.executemany(
            "insert into share (org_id, queue, virtual_s, active) values ($1, 'default', $2, true)",
            [(pond.org_id, 480.0), (other_org, 430.0)],
        )
    await settle(pond.engine_db, {(pond.org_id, "default"): -back_s})
    async with pond.engine_db.duty("test") as con:
        await check_order(con)
        least_s = await con.fetchval("select least_s from fair_clock")
    assert least_s == min(430.0, 480.0 - back_s)


async def test_an_org_behind_the_clock_does_not_take_it_back(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into fair_clock values ('default', 420.0)")
        await con.execute("insert into share values ($1, 'default', 1, 101.0, false)", pond.org_id)
    await settle(pond.engine_db, {(pond.org_id, "default"): -1.0})
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchval("select virtual_s from fair_clock") == 420.0
