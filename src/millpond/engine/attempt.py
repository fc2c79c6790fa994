"""An attempt: a claimed run with its code, and how flow code is run under a context.

Called by `executor`, `replaying` and `endgame`. Invariant: what ended flow code from outside always leaves
it as Unwind, whatever the flow made of it; an error of its own leaves it as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from pydantic import ValidationError

from millpond.engine import metering
from millpond.engine.branches import Unwind
from millpond.engine.context import Context
from millpond.engine.encoding import dump_error
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.recording import AGAIN_S
from millpond.engine.registry import Flow
from millpond.engine.scope import Scope
from millpond.engine.slots import Slot
from millpond.errors import InvalidInput, LeaseLost, Transient

R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Attempt:
    """A claimed run with its code; `context` is the one that its code uses now, to be ended from outside.

    `is_ending` says that how the run ends is decided, so that a cancel changes nothing any more; `ended` is
    why nothing more may be begun under this attempt. `slot` is that of a worker which counts them; `decided` is an
    error of the flow's own code, with the delay until its next try. `spent` is what its tries used on models and no
    record told of; whoever stores it takes it from there.
    """

    claimed: Claimed
    flow: Flow
    context: Context
    is_ending: bool = False
    ended: str | None = None
    slot: Slot | None = None
    decided: tuple[Exception, float | None] | None = None
    spent: list[Spent] = field(default_factory=list)

    @property
    def capability(self) -> str:
        """What its worker must have for it."""
        return self.flow.capability

    def unwind(self, reason: str) -> None:
        """End the attempt's code from outside, whichever context it uses."""
        if reason in ("drained", "lost"):
            self.ended = reason
        self.context.unwind(reason)

    def enter(self, context: Context) -> None:
        """Go on under another context, unless the attempt was ended meanwhile: then raises Unwind."""
        self.gather_spent()
        if self.ended is not None:
            raise Unwind(self.ended)
        self.context = context

    def gather_spent(self) -> list[Spent]:
        """Return what is to be stored of models with the next write, which stays until that is done."""
        if more := self.context.take_unrecorded():
            self.spent += more
        return self.spent


class Strand:
    """A block in which the current task runs flow code as the own strand of a context.

    It leaves by Unwind where it was ended from outside, whatever the code made of that, groups of errors too.
    """

    __slots__ = ("_context", "_task")
    _task: asyncio.Task[Any]

    def __init__(self, context: Context) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._task = self._context.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        context, task = self._context, self._task
        closed = context.closed
        try:
            if closed is not None:
                raise Unwind(closed) from error
            if error is None or isinstance(error, Exception) or task.cancelling():
                return
            raise Transient(
                f"the flow was ended by a {type(error).__name__} that nobody had asked for",
                code="stray_exit",
            ) from error
        finally:
            context.end(task)
            while task.cancelling():
                task.uncancel()


async def keep_spent(attempt: Attempt, scope: Scope) -> None:
    """Store what tries used that no record tells of, before the attempt ends by a write that has no place for it."""
    if spent := attempt.gather_spent():
        await insist(lambda: metering.keep(scope.database, attempt.claimed.lease, spent))
        spent.clear()


def read_input(flow: Flow, text: str | None) -> Any:
    """Return the flow's input; raises InvalidInput with the places at fault where it does not fit."""
    try:
        return flow.input.validator.validate_json(text or "null")
    except ValidationError as error:
        places = dump_error(error)["message"]
        raise InvalidInput(f"the input does not fit: {places}", param="input") from error


async def insist(write: Callable[[], Awaitable[R]]) -> R:
    """Do what an attempt needs of the database, again while that is out of reach."""
    last: Transient | None = None
    for _ in range(100):
        try:
            return await write()
        except Transient as error:
            last = error
            await asyncio.sleep(AGAIN_S)
    raise LeaseLost("the database stayed out of reach") from last
