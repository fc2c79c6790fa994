"""A slot is about executing code: it is given on while an end is stored, within bounds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.engine import storing
from millpond.engine.context import Context
from millpond.engine.slots import Slots


async def test_a_slot_handed_over_is_free_for_another_attempt() -> None:
    slots = Slots({"a": 2})
    first, second = slots.take("a", "f@1"), slots.take("a", "f@1")
    assert slots.free() == {}
    first.hand_over()
    assert slots.free() == {"a": 1}
    assert slots.used() == {"a": 1}
    first.give(0.1)
    second.give(0.1)
    assert slots.free() == {"a": 2}


async def test_no_more_ends_are_under_way_than_there_are_slots() -> None:
    slots = Slots({"a": 2})
    ending = [slots.take("a", "f@1") for _ in range(2)]
    for one in ending:
        one.hand_over()
    more = [slots.take("a", "f@1") for _ in range(2)]
    assert slots.free() == {}
    more[0].hand_over()
    assert slots.free() == {}, "three ends are under way"
    ending[0].give(0.1)
    assert slots.free() == {"a": 1}


async def test_a_slot_taken_again_counts_once() -> None:
    slots = Slots({"a": 1})
    slot = slots.take("a", "f@1")
    slot.hand_over()
    slot.take_again()
    assert slots.free() == {}
    slot.take_again()
    slot.give(0.1)
    assert slots.free() == {"a": 1}
    assert slots.used() == {}


async def test_the_next_run_starts_while_an_end_is_being_stored(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot, and every end held up: the second run starts, the third does not."""
    real, gate = storing.finish, asyncio.Event()
    started: list[int] = []

    async def held_up(*args: Any) -> Any:
        await gate.wait()
        return await real(*args)

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
