"""Sharing: what many ask for at once is carried out together, by one call for all of them.

Called by `family` and `resting`. Invariants: everybody gets an answer or an error of their own; a call that raises did
nothing, so that its questions are asked again in halves until the guilty one is alone; a call waits for nobody, and
what it would have to wait for is asked again later; who gave up waiting is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast, final

from millpond.errors import LeaseLost, Transient

Q = TypeVar("Q")
A = TypeVar("A")
# As much as a group commit takes.
MAX_BYTES = 4 * 1024 * 1024
# After so long what somebody held is asked for again, each time twice as long, up to the last.
AGAIN_S, LONGEST_S = 0.005, 0.5


@final
class Again:
    """The answer to a question for which somebody else would have to be waited for."""


AGAIN: Final = Again()


@dataclass(eq=False, slots=True)
class _Asked(Generic[Q, A]):
    """A question, the future of whoever asked, and after how long it is asked again where it has to be."""

    question: Q
    future: asyncio.Future[A]
    again_s: float = AGAIN_S


class Shared(Generic[Q, A]):
    """Gathers questions while calls are under way; `at_once` of these, of up to `most` questions each.

    `answer` returns, for each question in order, its answer, the error that is its own, or AGAIN. Questions of one
    call weigh no more than `MAX_BYTES`, if there are several.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception | Again]]],
        *,
        most: int = 50,
        at_once: int = 2,
        weight: Callable[[Q], int] = lambda _: 0,
    ) -> None:
        self._answer = answer
        self._most = most
        self._at_once = at_once
        self._weight = weight
        self._waiting: list[_Asked[Q, A]] = []
        self._later: set[_Asked[Q, A]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def ask(self, question: Q) -> asyncio.Future[A]:
        """Ask; the future has the answer, or raises what the question came to."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_exception(LeaseLost("this worker has stopped"))
        else:
            self._queue(_Asked(question, future))
        return future

    async def close(self) -> None:
        """Stop; whoever still waits gets LeaseLost."""
        self._is_closed = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        _fail([*self._waiting, *self._later], LeaseLost("this worker has stopped"))

    def _queue(self, asked: _Asked[Q, A]) -> None:
        self._waiting.append(asked)
        if len(self._calls) < self._at_once:
            # In a context of its own: it works for whoever asks, not for who asked first.
            call = asyncio.create_task(self._serve(), name="share", context=Context())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _serve(self) -> None:
        try:
            while self._waiting:
                taken = self._take()
                try:
                    await self._carry_out(taken)
                except asyncio.CancelledError:
                    _fail(taken, LeaseLost("this worker has stopped"))
                    raise
                except Exception as error:  # noqa: BLE001 - a fault of the answers; nobody waits for ever
                    _fail(taken, error)
        finally:
            # At once, and not when its task is seen to be over: who is answered now may ask again before that.
            self._calls.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _take(self) -> list[_Asked[Q, A]]:
        """Take the first questions off, at least one."""
        weight = 0
        for nth, asked in enumerate(self._waiting):
            weight += self._weight(asked.question)
            if nth == self._most or (nth > 0 and weight > MAX_BYTES):
                break
        else:
            nth = len(self._waiting)
        taken, self._waiting = self._waiting[:nth], self._waiting[nth:]
        return taken

    async def _carry_out(self, taken: Sequence[_Asked[Q, A]]) -> None:
        taken = [one for one in taken if not one.future.done()]
        if not taken:
            return
        try:
            answers = await self._answer([one.question for one in taken])
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asked gets it
            if len(taken) == 1 or isinstance(error, Transient):
                _fail(taken, error)
                return
            middle = len(taken) // 2
            await self._carry_out(taken[:middle])
            await self._carry_out(taken[middle:])
            return
        for one, answer in zip(taken, answers, strict=True):
            if isinstance(answer, Again):
                self._put_off(one)
            elif isinstance(answer, Exception):
                _fail([one], answer)
            elif not one.future.done():
                one.future.set_result(answer)

    def _put_off(self, asked: _Asked[Q, A]) -> None:
        self._later.add(asked)
        asyncio.get_running_loop().call_later(asked.again_s, self._ask_again, asked)
        asked.again_s = min(2 * asked.again_s, LONGEST_S)

    def _ask_again(self, asked: _Asked[Q, A]) -> None:
        self._later.discard(asked)
        if not asked.future.done() and not self._is_closed:
            self._queue(asked)


def _fail(waiting: Sequence[_Asked[Any, Any]], error: Exception) -> None:
    for one in waiting:
        if not one.future.done():
            one.future.set_exception(error)
            one.future.exception()  # read here: nobody may wait any more
