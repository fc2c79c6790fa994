"""Sharing: what many ask for at once is carried out together, by one call for all of them.

Called by `family` and `resting`. Invariants: everybody gets an answer or an error of their own; a call that raises did
nothing, so that its questions are asked again in halves until the guilty one is alone; who is to be asked for alone
holds up nobody else; who gave up waiting is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Generic, TypeVar, cast, final

from millpond.errors import LeaseLost, Transient

Q = TypeVar("Q")
A = TypeVar("A")
# As much as a group commit takes.
MAX_BYTES = 4 * 1024 * 1024


@final
class Alone:
    """The answer to a question that has to wait for somebody, which the others of its call shall not."""


ALONE: Final = Alone()


class Shared(Generic[Q, A]):
    """Gathers questions while calls are under way; `at_once` of these, of up to `most` questions each.

    `answer` returns, for each question in order, its answer, the error that is its own, or ALONE, which it never
    gives to one that is alone. Questions of one call weigh no more than `MAX_BYTES`, if there are several.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception | Alone]]],
        *,
        most: int = 50,
        at_once: int = 2,
        weight: Callable[[Q], int] = lambda _: 0,
    ) -> None:
        self._answer = answer
        self._most = most
        self._at_once = at_once
        self._weight = weight
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._alone: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def ask(self, question: Q) -> asyncio.Future[A]:
        """Ask; the future has the answer, or raises what the question came to."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_exception(LeaseLost("this worker has stopped"))
            return future
        self._waiting.append((question, future))
        if len(self._calls) < self._at_once:
            _begin(self._serve(), self._calls)
        return future

    async def close(self) -> None:
        """Stop; whoever still waits gets LeaseLost."""
        self._is_closed = True
        calls = [*self._calls, *self._alone]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        _fail(self._waiting, LeaseLost("this worker has stopped"))

    async def _serve(self) -> None:
        try:
            while self._waiting:
                await self._settle(self._take())
        finally:
            # At once, and not when its task is seen to be over: who is answered now may ask again before that.
            self._calls.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _take(self) -> list[tuple[Q, asyncio.Future[A]]]:
        """Take the first questions off, at least one."""
        weight = 0
        for nth, (question, _) in enumerate(self._waiting):
            weight += self._weight(question)
            if nth == self._most or (nth > 0 and weight > MAX_BYTES):
                break
        else:
            nth = len(self._waiting)
        taken, self._waiting = self._waiting[:nth], self._waiting[nth:]
        return taken

    async def _settle(self, taken: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        """Answer these, whatever happens."""
        try:
            await self._carry_out(taken)
        except asyncio.CancelledError:
            _fail(taken, LeaseLost("this worker has stopped"))
            raise
        except Exception as error:  # noqa: BLE001 - a fault of the answers; nobody waits for ever
            _fail(taken, error)

    async def _carry_out(self, taken: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        taken = [one for one in taken if not one[1].done()]
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
        for one, answer in zip(taken, answers, strict=True):
            if isinstance(answer, Alone):
                _begin(self._settle([one]), self._alone)
            elif isinstance(answer, Exception):
                _fail([one], answer)
            elif not one[1].done():
                one[1].set_result(answer)


def _begin(call: Coroutine[Any, Any, None], calls: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(call, name="share")
    calls.add(task)
    task.add_done_callback(calls.discard)


def _fail(waiting: Sequence[tuple[Q, asyncio.Future[A]]], error: Exception) -> None:
    for _, future in waiting:
        if not future.done():
            future.set_exception(error)
            future.exception()  # read here: nobody may wait any more
