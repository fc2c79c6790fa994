"""Sharing: what many ask for at once is carried out together, by one call for all of them.

Called by `family`. Invariants: everybody gets an answer or an error of their own; a call that raises did nothing, so
that its questions are asked again in halves until the guilty one is alone; who gave up waiting is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from millpond.errors import LeaseLost, Transient

Q = TypeVar("Q")
A = TypeVar("A")


class Shared(Generic[Q, A]):
    """Gathers questions while calls are under way; `at_once` of these, of up to `most` questions each.

    `answer` returns, for each question in order, its answer or the error that is its own.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]],
        *,
        most: int = 50,
        at_once: int = 2,
    ) -> None:
        self._answer = answer
        self._most = most
        self._at_once = at_once
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def ask(self, question: Q) -> asyncio.Future[A]:
        """Ask; the future has the answer, or raises what the question came to."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_exception(LeaseLost("this worker has stopped"))
            return future
        self._waiting.append((question, future))
        if len(self._calls) < self._at_once:
            call = asyncio.create_task(self._serve(), name="share")
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        return future

    async def close(self) -> None:
        """Stop; whoever still waits gets LeaseLost."""
        self._is_closed = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        _fail(self._waiting, LeaseLost("this worker has stopped"))

    async def _serve(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            try:
                await self._carry_out([one for one in taken if not one[1].done()])
            except asyncio.CancelledError:
                _fail(taken, LeaseLost("this worker has stopped"))
                raise

    async def _carry_out(self, taken: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        if not taken:
            return
        try:
            answers = await self._answer([question for question, _ in taken])
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asked gets it
            if len(taken) == 1 or isinstance(error, Transient):
                _fail(taken, error)
                return
            middle = len(taken) // 2
            await self._carry_out(taken[:middle])
            await self._carry_out(taken[middle:])
            return
        for (_, future), answer in zip(taken, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
                future.exception()  # read here: nobody may wait any more
            else:
                future.set_result(answer)


def _fail(waiting: Sequence[tuple[Q, asyncio.Future[A]]], error: Exception) -> None:
    for _, future in waiting:
        if not future.done():
            future.set_exception(error)
            future.exception()  # read here: nobody may wait any more
