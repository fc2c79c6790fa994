"""Fanning out: `ctx.parallel` and `ctx.map`, branches side by side under one bound.

A part of `Context`. Invariants: a branch's path is its position, so that its steps keep their keys
whatever ends first; a branch that waits gives its place in the bound to the next one, unless the caller
counts waiting ones too, and needs one again to go on, ahead of those not begun; of these the ones begin first for whose
steps there is room already, and what has no place then gives its room back; all branches are over before the fan is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from millpond.engine.bounds import Bound
from millpond.engine.branches import Branch, Branches, Parked, Seats, Unwind
from millpond.engine.checkpoints import Checkpoints
from millpond.engine.strays import raise_stray
from millpond.errors import InvalidInput

T = TypeVar("T")
R = TypeVar("R")
Body = Callable[[], Awaitable[Any]]


class Fanning(Checkpoints):
    """The calls that make branches."""

    async def parallel(self, *branches: Awaitable[Any]) -> tuple[Any, ...]:
        """Run coroutines side by side, each a branch, and return their results in order.

        Waits for all of them; then raises the failure of the first by position, if any failed.
        """
        try:
            bodies = [partial(_given, one) for one in branches]
            return tuple(await fan(self._branches, bodies, catch_up=self._catch_up))
        finally:
            for one in branches:
                if asyncio.iscoroutine(one):
                    one.close()  # those that never began; it means nothing to the others

    async def map(
        self,
        function: Callable[[T], Awaitable[R]],
        items: Iterable[T],
        *,
        limit: int = 10,
        bound_waiting: bool = False,
    ) -> list[R]:
        """Call `function` for every item, each a branch, at most `limit` at a time; results in order.

        A branch that waits (for a time, a human, a signal, a child) holds no slot and gives its place to
        the next item. With `bound_waiting` it keeps its place: at most `limit` items are begun and not
        over. Fails as `parallel` does.
        """
        if limit < 1:
            raise InvalidInput("map takes a limit of at least 1", param="limit")
        bodies = [partial(function, item) for item in items]
        return await fan(
            self._branches,
            bodies,
            limit=limit,
            bound_waiting=bound_waiting,
            catch_up=self._catch_up,
        )


async def fan(
    branches: Branches,
    bodies: Sequence[Body],
    *,
    catch_up: Callable[[], Awaitable[None]],
    limit: int | None = None,
    bound_waiting: bool = False,
) -> list[Any]:
    """Run bodies as branches of the current strand, once it has caught up; returns their results in order.

    The fork is counted before, whatever becomes of that.
    """
    fan = _Fan(branches, bodies, limit or max(1, len(bodies)), bound_waiting=bound_waiting)
    if not bodies:
        return []
    await catch_up()
    return await fan.gather()


async def _given(awaitable: Awaitable[R]) -> R:
    return await awaitable


class _Fan:
    """The branches of one call; begins the next whenever there is a place."""

    def __init__(
        self, branches: Branches, bodies: Sequence[Body], limit: int, *, bound_waiting: bool
    ) -> None:
        self._branches = branches
        self._parent = branches.here()
        self._path = self._parent.fork()
        self._bodies = bodies
        self._bound = Bound(limit)
        self._bound_waiting = bound_waiting
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._left = deque(range(len(bodies)))
        self._woken: deque[Parked] = deque()
        self._unfinished = 0
        self._is_stopped = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def gather(self) -> list[Any]:
        """Run them all; raises Unwind, or the failure of the first by position."""
        if (seats := self._branches.seats) is not None and len(self._left) > self._bound.limit:
            seated = self._seated(seats)
            self._left = deque(sorted(self._left, key=lambda index: index not in seated))
            self._begin()
            seats.give_back(key for index in self._left for key in seated.get(index, ()))
        else:
            self._begin()
        self._branches.rest(self._parent)
        try:
            await self._over
        except asyncio.CancelledError as error:
            self._is_stopped = True
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            if self._branches.closed is not None:
                raise Unwind(self._branches.closed) from error
            raise
        tasks = [self._tasks[index] for index in sorted(self._tasks)]
        errors = [None if task.cancelled() else task.exception() for task in tasks]
        for unwind in errors:
            if isinstance(unwind, Unwind):
                raise unwind
        for first in errors:
            if first is not None:
                raise first
        return [task.result() for task in tasks]

    def _seated(self, seats: Seats) -> dict[int, list[str]]:
        """Return the steps that have room already, by the branch below which they are."""
        found: dict[int, list[str]] = {}
        start = f"{self._path}."
        for key in seats.keys:
            if key.startswith(start):
                found.setdefault(int(key[len(start) :].partition("/")[0]), []).append(key)
        return found

    def _begin(self) -> None:
        """Let as many branches as have a place go on or begin."""
        while self._bound.has_place and self._branches.closed is None and not self._is_stopped:
            if self._woken:
                self._branches.wake_again(self._woken.popleft())
            elif self._left:
                self._start(self._left.popleft())
            else:
                return

    def _start(self, index: int) -> None:
        branch = Branch(f"{self._path}.{index}/", parent=self._parent, bound=self._bound)
        branch.on_go = partial(self._bound.placed.add, branch)
        branch.may_go = partial(self._has_place, branch)
        if not self._bound_waiting:
            branch.on_rest = partial(self._rested, branch)
        task = asyncio.ensure_future(self._run(self._bodies[index]))
        self._tasks[index] = task
        self._unfinished += 1
        # Counted in before it begins, so that the attempt does not park meanwhile.
        self._branches.enter(task, branch)
        task.add_done_callback(partial(self._ended, branch))

    async def _run(self, body: Body) -> Any:
        try:
            return await body()
        except asyncio.CancelledError as error:
            if self._branches.closed is not None:
                raise Unwind(self._branches.closed) from error
            raise_stray(error, "a branch")

    def _has_place(self, branch: Branch, parked: Parked) -> bool:
        """Whether the branch may go on now; where not, the strand that would is woken in its turn."""
        if self._bound.has_for(branch):
            return True
        self._woken.append(parked)
        return False

    def _rested(self, branch: Branch) -> None:
        self._bound.placed.discard(branch)
        self._begin()

    def _ended(self, branch: Branch, task: asyncio.Task[Any]) -> None:
        self._branches.leave(task)
        self._unfinished -= 1
        self._rested(branch)
        if self._unfinished == 0:
            self._branches.go(self._parent)
            if not self._over.done():
                self._over.set_result(None)
        if branch.going > 0:
            self._branches.rest(branch)
