"""What many ask for at once is carried out together, and everybody gets an answer or an error of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from millpond.engine import sharing
from millpond.engine.sharing import AGAIN, Again, Shared
from millpond.errors import LeaseLost, NotFound, Unavailable


class Desk:
    """Answers numbers with their double; `calls` are what it was asked, `gate` holds it up."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.guilty: set[int] = set()
        self.odd: set[int] = set()
        self.is_away = False
        self.held: set[int] = set()

    async def answer(self, numbers: Sequence[int]) -> list[int | Exception | Again]:
        self.calls.append(list(numbers))
        await self.gate.wait()
        if self.is_away:
            raise Unavailable("the database is away")
        if self.guilty & set(numbers):
            raise ValueError("one of these")
        return [self._one(one) for one in numbers]

    def _one(self, number: int) -> int | Exception | Again:
        if number in self.held:
            return AGAIN
        return NotFound(f"no {number}") if number in self.odd else 2 * number


async def test_what_comes_while_calls_are_under_way_is_asked_together() -> None:
    desk = Desk()
    desk.gate.clear()
    shared: Shared[int, int] = Shared(desk.answer, most=3, at_once=1)
    asked = [shared.ask(nth) for nth in range(2)]
    await asyncio.sleep(0)
    asked += [shared.ask(nth) for nth in range(2, 7)]
    desk.gate.set()
    assert await asyncio.gather(*asked) == [0, 2, 4, 6, 8, 10, 12]
    assert desk.calls == [[0, 1], [2, 3, 4], [5, 6]]


async def test_an_answer_that_is_an_error_is_only_for_whoever_asked() -> None:
    desk = Desk()
    desk.odd = {1}
    shared: Shared[int, int] = Shared(desk.answer)
    first, second, third = await asyncio.gather(
        *(shared.ask(nth) for nth in range(3)), return_exceptions=True
    )
    assert (first, third) == (0, 4)
    assert isinstance(second, NotFound)


async def test_a_call_that_fails_is_made_again_in_halves_until_the_guilty_one_is_alone() -> None:
    desk = Desk()
    desk.guilty = {2}
    shared: Shared[int, int] = Shared(desk.answer)
    answers = await asyncio.gather(*(shared.ask(nth) for nth in range(5)), return_exceptions=True)
    assert [one for one in answers if isinstance(one, int)] == [0, 2, 6, 8]
    assert isinstance(answers[2], ValueError)


async def test_when_the_database_is_away_everybody_hears_it_at_once() -> None:
    desk = Desk()
    desk.is_away = True
    shared: Shared[int, int] = Shared(desk.answer)
    answers = await asyncio.gather(*(shared.ask(nth) for nth in range(4)), return_exceptions=True)
    assert [type(one) for one in answers] == [Unavailable] * 4
    assert len(desk.calls) == 1


async def test_who_gave_up_is_left_out() -> None:
    desk = Desk()
    desk.gate.clear()
    shared: Shared[int, int] = Shared(desk.answer, at_once=1)
    first = shared.ask(0)
    await asyncio.sleep(0)
    second, third = shared.ask(1), shared.ask(2)
    second.cancel()
    desk.gate.set()
    assert (await first, await third) == (0, 4)
    assert desk.calls == [[0], [2]]


async def test_closed_it_answers_nobody_any_more() -> None:
    desk = Desk()
    desk.gate.clear()
    shared: Shared[int, int] = Shared(desk.answer, most=1, at_once=1)
    asked = [shared.ask(nth) for nth in range(2)]
    await asyncio.sleep(0)
    await shared.close()
    for future in [*asked, shared.ask(2)]:
        with pytest.raises(LeaseLost):
            await future


async def test_whoever_asks_again_as_calls_end_is_answered() -> None:
    """Calls that end in one turn of the loop are no calls under way for those whom they answered."""
    desk = Desk()
    desk.gate.clear()
    shared: Shared[int, int] = Shared(desk.answer, most=1, at_once=2)

    async def ask_twice(number: int) -> list[int]:
        return [await shared.ask(number), await shared.ask(number)]

    async with asyncio.timeout(5):
        asking = asyncio.gather(ask_twice(1), shared.ask(2))
        await asyncio.sleep(0.01)
        desk.gate.set()
        assert await asking == [[2, 2], 4]


async def test_those_that_have_to_wait_for_somebody_hold_up_nobody_else() -> None:
    desk = Desk()
    desk.held = {1, 2, 3}
    shared: Shared[int, int] = Shared(desk.answer, most=1, at_once=2)
    held = [shared.ask(nth) for nth in (1, 2, 3)]
    async with asyncio.timeout(5):
        assert await asyncio.gather(*(shared.ask(nth) for nth in (4, 5, 6))) == [8, 10, 12]
        assert not any(one.done() for one in held)
        held[2].cancel()
        desk.held.clear()
        assert await asyncio.gather(*held[:2]) == [2, 4]
    assert len(desk.calls) < 200, "it asks again with pauses"


async def test_whoever_waits_for_somebody_as_it_is_closed_is_told() -> None:
    desk = Desk()
    desk.held = {1}
    shared: Shared[int, int] = Shared(desk.answer)
    held = shared.ask(1)
    await shared.ask(2)
    await shared.close()
    with pytest.raises(LeaseLost):
        await held


async def test_a_call_takes_no_more_than_weighs_the_most_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing, "MAX_BYTES", 5)
    desk = Desk()
    shared: Shared[int, int] = Shared(desk.answer, at_once=1, weight=lambda number: number)
    await asyncio.gather(*(shared.ask(nth) for nth in (2, 3, 1, 9, 4)))
    assert desk.calls == [[2, 3], [1], [9], [4]]


async def test_who_gives_up_while_a_call_fails_is_not_asked_for_again() -> None:
    desk = Desk()
    desk.guilty = {3}
    desk.gate.clear()
    shared: Shared[int, int] = Shared(desk.answer)
    asked = [shared.ask(nth) for nth in range(4)]
    await asyncio.sleep(0)
    asked[0].cancel()
    asked[1].cancel()
    desk.gate.set()
    assert await asked[2] == 4
    with pytest.raises(ValueError, match="one of these"):
        await asked[3]
    assert desk.calls == [[0, 1, 2, 3], [2, 3], [2], [3]]


async def test_answers_that_are_too_few_leave_nobody_waiting() -> None:
    async def answer(numbers: Sequence[int]) -> list[int]:
        return [2 * one for one in numbers[:-1]]

    shared: Shared[int, int] = Shared(answer)
    first, second = shared.ask(1), shared.ask(2)
    async with asyncio.timeout(5):
        await asyncio.wait({first, second})
    assert isinstance(second.exception(), ValueError)
