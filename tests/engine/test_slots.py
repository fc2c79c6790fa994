"""A slot is about executing code: it is given on while an end is stored, within bounds."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import EngineDatabase
from millpond.db.transaction import Chain
from millpond.engine import inputs, storing
from millpond.engine.context import Context
from millpond.engine.launching import Launcher
from millpond.engine.leases import Claimed, Lease
from millpond.engine.slots import Slots
from millpond.errors import Transient


async def test_a_slot_handed_over_is_free_for_another_attempt() -> None:
    slots = Slots({"a": 2})
    first, second = slots.take("a"), slots.take("a")
    assert slots.free() == {}
    first.hand_over()
    assert slots.free() == {"a": 1}
    assert slots.used() == {"a": 1}
    first.give()
    second.give()
    assert slots.free() == {"a": 2}


async def test_no_more_ends_are_under_way_than_there_are_slots() -> None:
    slots = Slots({"a": 2})
    ending = [slots.take("a") for _ in range(2)]
    for one in ending:
        one.hand_over()
    more = [slots.take("a") for _ in range(2)]
    assert slots.free() == {}
    more[0].hand_over()
    assert slots.free() == {}, "three ends are under way"
    ending[0].give()
    assert slots.free() == {"a": 1}


async def test_a_slot_taken_again_counts_once() -> None:
    slots = Slots({"a": 1})
    slot = slots.take("a")
    slot.hand_over()
    slot.take_again()
    assert slots.free() == {}
    slot.take_again()
    slot.give()
    assert slots.free() == {"a": 1}
    assert slots.used() == {}


def test_slots_of_long_work_are_not_all_filled_at_once() -> None:
    """Those filled together are free together, and whoever comes just after that waits for all of it."""
    slots = Slots({"long": 20, "short": 20})
    assert slots.wanted() == {"long": 20, "short": 20}, "of no work is known how long it takes"
    for queue, used_s in (("long", 0.5), ("short", 0.001)):
        slots.take(queue)
        slots.give(queue, "f@1", used_s)
    assert slots.wanted() == {"long": 5, "short": 20}
    for _ in range(200):
        slots.take("long")
        slots.give("long", "f@1", 0.001)
    assert slots.wanted() == {"long": 20, "short": 20}


async def test_the_next_run_starts_while_an_end_is_being_stored(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot, and every end held up: the second run starts, the third does not."""
    real, gate = storing.finish, asyncio.Event()
    started: list[int] = []

    async def held_up(*args: Any, **options: Any) -> Any:
        await gate.wait()
        return await real(*args, **options)

    monkeypatch.setattr(storing, "finish", held_up)

    async def quick(ctx: Context, n: int) -> None:
        started.append(n)

    flow = pond.flow(quick)
    ids = [await pond.submit(flow, n) for n in range(3)]
    async with pond.worker(slots={"default": 1}):
        async with asyncio.timeout(20):
            while len(started) < 2:
                await asyncio.sleep(0.01)
        assert started == [0, 1]
        assert await pond.count("lease") == 2
        gate.set()
        for run_id in ids:
            await pond.ended(run_id)
    assert started == [0, 1, 2]


async def test_a_claim_asks_for_no_more_than_half_of_many_slots() -> None:
    slots = Slots({"many": 200, "few": 20, "some": 40})
    assert slots.wanted() == {"many": 100, "few": 20, "some": 32}
    for _ in range(150):
        slots.take("many")
    assert slots.wanted() == {"many": 50, "few": 20, "some": 32}


async def test_a_claim_is_followed_at_once_where_a_quarter_of_the_slots_is_free_beside_it() -> None:
    slots = Slots({"a": 64, "b": 4})
    assert slots.has_beyond({"a": 32}), "half of them are free beside it"
    assert slots.has_beyond({"a": 48})
    assert not slots.has_beyond({"a": 49})
    assert slots.has_beyond({"a": 64, "b": 3}), "of one queue is enough"
    assert not slots.has_beyond({})
    for _ in range(32):
        slots.take("a")
    assert not slots.has_beyond({"a": 32})


async def test_a_worker_that_waits_holds_no_transaction_of_a_claim_that_did_not_follow(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fills all it is for takes the next one to follow at once, and may be wrong."""
    chains, waited_with = list[Chain](), list[bool]()
    gate = asyncio.Event()
    make, wait = EngineDatabase.chain, Slots.wait

    def made(self: EngineDatabase, name: str, **options: Any) -> Chain:
        chains.append(make(self, name, **options))
        return chains[-1]

    async def spied(self: Slots, timeout_s: float) -> None:
        waited_with.append(any(one._is_open for one in chains))
        await wait(self, timeout_s)

    async def hold(ctx: Context, n: int) -> None:
        await gate.wait()

    monkeypatch.setattr(EngineDatabase, "chain", made)
    monkeypatch.setattr(Slots, "wait", spied)
    monkeypatch.setattr(Slots, "has_beyond", lambda *_: True)
    flow = pond.flow(hold)
    # The first claim is for 32 of the slots and leaves less than a quarter, so that the next is not at once.
    runs = [await pond.submit(flow, n) for n in range(36)]
    async with pond.worker(slots={"default": 40}):
        for run_id in runs:
            await pond.until(run_id, "run.started")
        gate.set()
        for run_id in runs:
            await pond.ended(run_id)
    assert waited_with
    assert not any(waited_with)


async def test_a_queue_that_gave_all_that_was_asked_for_is_claimed_again_at_once() -> None:
    slots = Slots({"a": 200})
    slots.expect()
    wanted = slots.wanted()
    slots.note_claim(wanted, [_claimed("a") for _ in range(99)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slots.wait(10)
    slots.note_claim(wanted, [_claimed("a") for _ in range(100)])
    async with asyncio.timeout(0.05):
        await slots.wait(10)


async def test_the_end_of_work_whose_room_is_waited_for_is_a_reason_to_claim() -> None:
    slots = Slots({"a": 100})
    awaited, other = slots.take("a"), slots.take("a")
    slots.note_awaited(frozenset({"f@1"}))
    slots.expect()
    other.start(1, "g@1")
    other.give()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slots.wait(10)
    awaited.start(1, "f@1")
    awaited.give()
    async with asyncio.timeout(20):
        await slots.wait(10)


async def test_a_launch_that_is_ended_before_its_first_step_gives_its_slots_back() -> None:
    slots = Slots({"a": 2})
    scope: Any = None
    launcher = Launcher(scope, slots, flows={}, steps={}, start=lambda _: None)
    claimed = _claimed("a")
    launched = launcher.launch([claimed])
    assert slots.free() == {"a": 1}
    launched.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launched
    assert slots.free() == {"a": 2}
    assert launcher.leases() == set()


async def test_a_slot_without_an_attempt_teaches_nothing() -> None:
    slots = Slots({"a": 1})
    before_s = slots.estimate_s("f@1")
    slots.take("a").give_unused(1, "f@1")
    assert slots.free() == {"a": 1}
    assert slots.estimate_s("f@1") == before_s


async def test_work_that_cannot_be_started_is_handed_back_and_its_slots_are_free(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes along with a claim cannot be read, once: the run is executed later, in the one slot."""
    real, failures = inputs.complete, [Transient("no connection")]

    async def fails_once(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return await real(*args)

    monkeypatch.setattr(inputs, "complete", fails_once)

    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    run_id = await pond.submit(flow, 1)
    async with pond.worker(slots={"default": 1}):
        await pond.ended(run_id)
    assert failures == []
    assert "run.released" in await pond.kinds(run_id)


def _claimed(queue: str) -> Claimed:
    run_id = uuid.uuid4()
    return Claimed(
        Lease(1, run_id, run_id, 1, run_id),
        deaths=0,
        tries=0,
        cancel_requested=False,
        flow="f",
        version=1,
        queue=queue,
        input="null",
        subject="user:x",
        timeout_s=None,
    )


async def test_work_behind_what_somebody_holds_locked_goes_on(pond: Pond) -> None:
    """More of it than there are slots, so that the claim has to read on behind what it cannot have."""

    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    ids = [await pond.submit(flow, n) for n in range(40)]
    held, others = ids[16:28], [*ids[:16], *ids[28:]]
    async with pond.engine_db.duty("test") as con:
        await con.execute("select from item where item_id = any($1::uuid[]) for update", held)
        async with pond.worker(slots={"default": 8}):
            for run_id in others:
                await pond.ended(run_id)
            assert await pond.count("item") == len(held)
