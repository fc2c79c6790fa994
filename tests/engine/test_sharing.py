"""What many ask for at once is carried out together, and everybody gets an answer or an error of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from millpond.engine.sharing import Shared
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

    async def answer(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.calls.append(list(numbers))
        await self.gate.wait()
        if self.is_away:
            raise Unavailable("the database is away")
        if self.guilty & set(numbers):
            raise ValueError("one of these")
        return [NotFound(f"no {one}") if one in self.odd else 2 * one for one in numbers]


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
