"""Branches: the parallel strands of one attempt, their step keys, and how they are ended from outside.

Called by `context` and the rooms of its calls. Invariants: a step key depends only on the branch's place
in the flow and on how often its name occurred there; the attempt parks when the flow's own strand and
every one below it rest; a parked strand is woken once, while its attempt is open, and counts as going from
that moment on; once closed, an attempt's flow code gets nothing but `Unwind`.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from millpond import veil
from millpond.engine.bounds import Bound, Bounds, Copies, take
from millpond.engine.history import Recorded
from millpond.engine.needs import Ask
from millpond.errors import InvalidInput, Permanent

_NAME = re.compile(r"[\w.\- ]{1,200}")
_FORKED = re.compile(r"(.*)~(\d+)\.\d+/")


class Unwind(BaseException):
    """Ends flow code from outside: parked, cancelled, drained, timed out, or the lease is lost.

    Flow code must let it pass; `except Exception` does.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, eq=False)
class Branch:
    """One strand: its path in the flow (`` for the flow itself) and what it has counted.

    `going` counts what can go on: the strand itself and the branches below it; `on_rest` and `on_go`
    are told when that becomes none, or some again. `may_go` is asked before the end of a wait makes it some:
    where there is no room yet, it keeps the parked strand and wakes it in its turn. `bound` has the places of its fan,
    where it needs one to go on. `places` are the keys that it gave out, each with its place: the order in which the
    code asked, from 0; `forked_at` is the next place at each of its forks.
    """

    path: str
    parent: Branch | None = None
    going: int = 0
    on_rest: Callable[[], None] | None = None
    on_go: Callable[[], None] | None = None
    may_go: Callable[[Parked], bool] | None = None
    bound: Bound | None = None
    occurrences: dict[str, int] = field(default_factory=dict)
    forks: int = 0
    forked_at: list[int] = field(default_factory=list)
    is_in_step: bool = False
    park: Parked | None = None
    places: dict[str, int] = field(default_factory=dict)

    @property
    def bounds(self) -> Bounds:
        """The bounds in which it needs a place to go on; none where it goes on already."""
        found = []
        above: Branch | None = self
        while above is not None and above.going == 0:
            if above.bound is not None:
                found.append((above.bound, above))
            above = above.parent
        return tuple(found)

    def fork(self) -> str:
        """Return the path under which the next parallel branches stand."""
        nth = self.forks
        self.forks += 1
        self.forked_at.append(len(self.places))
        return f"{self.path}~{nth}"

    def place(self, what: str) -> str:
        """Return where the next call of this kind stands, for calls that record nothing."""
        nth = self.occurrences.get(f"!{what}", 0)
        self.occurrences[f"!{what}"] = nth + 1
        return f"{self.path}!{what}:{nth}"

    def key(self, name: str) -> str:
        """Return the key of the next step of this name: `path name:occurrence`."""
        occurrences, places = self.occurrences, self.places
        nth = occurrences.get(name, 0)
        if nth == 0:
            _check_name(name)
        occurrences[name] = nth + 1
        key = f"{self.path}{name}:{nth}"
        places[key] = len(places)
        return key

    def move(self, path: str) -> None:
        """Let this strand stand at another place in the flow, where nothing is counted yet."""
        self.path = path
        self.occurrences, self.places = {}, {}
        self.forks, self.forked_at = 0, []


@dataclass(slots=True, eq=False)
class Parked:
    """A strand that waits for what is recorded at a step's key, or with an `ask` for room for that step.

    `end` is how that ended, once it is known; `over` tells the strand, once it also has room to go on.
    """

    branch: Branch
    step_key: str
    is_human: bool
    over: asyncio.Future[Recorded]
    end: Recorded | None = None
    ask: Ask | None = None


def forked_from(path: str) -> tuple[str, int] | None:
    """Return the path of the strand that a branch was forked from, and by which of its forks."""
    found = _FORKED.fullmatch(path)
    return None if found is None else (found[1], int(found[2]))


@lru_cache(maxsize=1024)
def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} cannot name a step: 1 to 200 letters, digits and ._- and blanks are expected",
            param="name",
        )


def refuse_secret(key: str) -> None:
    """Raise where a key that is about to be recorded ends in a name that shows a secret: names are kept as they are.

    What stands before is of branches: numbers, and for an undo the key of the step that it undoes, which is recorded.
    An undo's own name is taken as it is: it stands in the code, which knew no secret, and what is promised is done.
    """
    drawn = veil.drawn()
    if drawn is None or key.startswith("!undo/"):
        return
    name = key.rpartition("/")[2]
    if drawn.text(name) != name:
        raise InvalidInput("the name of a step shows a secret", param="name", code="secret_in_name")


class Seats(Protocol):
    """The steps of an attempt that have room before their branches are begun, by key."""

    @property
    def keys(self) -> Iterable[str]:
        """Those that have not begun."""

    def give_back(self, step_keys: Iterable[str]) -> None:
        """Give back the room of steps whose branches do not begin now."""


class Branches:
    """All strands of one attempt; knows when none of them can go on.

    `on_mixed` is told when a strand has parked while others go on; `seats` is the room that steps have already.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_task: dict[asyncio.Task[Any], Branch] = {}
        self._parked: dict[Parked, None] = {}
        self.seats: Seats | None = None
        self.on_mixed: Callable[[Branches], None] | None = None
        self.closed: str | None = None

    def enter(self, task: asyncio.Task[Any], branch: Branch) -> None:
        """Make a task a strand that can go on, also before it has begun."""
        self._by_task[task] = branch
        self.go(branch)

    def here(self) -> Branch:
        """Return the strand of the current task; refuses foreign tasks and closed attempts."""
        if self.closed is not None:
            raise Unwind(self.closed)
        branch = self._by_task.get(asyncio.current_task(self._loop))  # type: ignore[arg-type]
        if branch is None:
            raise Permanent(
                "ctx was used from a task that the flow started by itself",
                code="foreign_task",
                advice="use ctx.parallel for things at the same time, timeout_s for time limits",
            )
        if branch.is_in_step:
            raise Permanent(
                "ctx was used inside a step", code="nested_step", advice="call it in the flow body"
            )
        return branch

    def place(self, key: str) -> int | None:
        """Return the place of a key that the current strand gave out."""
        branch = self._by_task.get(asyncio.current_task(self._loop))  # type: ignore[arg-type]
        return None if branch is None else branch.places.get(key)

    def at(self, path: str) -> Branch | None:
        """Return the strand that stands at a path, if there is one."""
        return next((one for one in self._by_task.values() if one.path == path), None)

    def rest(self, branch: Branch) -> None:
        """Count that the strand, or one below it, cannot go on; when none can, the attempt parks."""
        branch.going -= 1
        if branch.going > 0:
            return
        # Told first: it may begin another branch beside this one, and then the parent does not rest.
        if branch.on_rest is not None:
            branch.on_rest()
        if branch.parent is not None:
            self.rest(branch.parent)
        elif self._parked:
            self.close("parked")

    def go(self, branch: Branch) -> None:
        """Count that the strand, or one below it, can go on."""
        branch.going += 1
        if branch.going > 1:
            return
        if branch.on_go is not None:
            branch.on_go()
        if branch.parent is not None:
            self.go(branch.parent)

    def goes_beside(self, branch: Branch) -> bool:
        """Whether another strand goes on beside this one, so that the attempt does not park with it."""
        above: Branch | None = branch
        while above is not None and above.going <= 1:
            above = above.parent
        return above is not None

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Forget a task's strand."""
        self._by_task.pop(task, None)

    @property
    def parked(self) -> list[Parked]:
        """The strands that wait, in the order in which they began to."""
        return list(self._parked)

    @property
    def lined(self) -> list[Parked]:
        """Those of the strands that wait for room whose steps are to stand in line as the attempt parks, by time.

        Of those that wait for the same keys no more than their bounds let go on at a time: the others could not use
        what they got, and begin as these are over. So a run is not called for more.
        """
        lined = []
        copies: defaultdict[tuple[str, ...], Copies] = defaultdict(Copies)
        asks = [(one.ask, one) for one in self._parked if one.ask is not None]
        for ask, one in sorted(asks, key=lambda of: of[0].since_us or 0):
            if take(copies[ask.keys].of(one.branch.bounds)):
                lined.append(one)
        return lined

    async def park(
        self, branch: Branch, step_key: str, *, is_human: bool, ask: Ask | None = None
    ) -> Recorded:
        """Let this strand wait for something recorded; returns its end when the strand is woken by it.

        With an `ask` it waits for room, and is woken by whoever gives it that.

        Raises Unwind when the attempt is closed first, as it is when no other strand goes on.
        """
        if self.closed is not None:
            raise Unwind(self.closed)
        parked = Parked(branch, step_key, is_human, self._loop.create_future(), ask=ask)
        branch.park = parked
        self._parked[parked] = None
        self.rest(branch)
        self._tell_mixed()
        try:
            return await parked.over
        except asyncio.CancelledError as error:
            if self.closed is not None:
                raise Unwind(self.closed) from error
            if branch.park is parked:  # a time limit of the flow's own: this strand goes on
                self._unpark(parked)
            raise

    def wake(self, parked: Parked, end: Recorded) -> None:
        """Let a parked strand go on with the end of its wait, as soon as all bounds above have room."""
        parked.end = end
        self.wake_again(parked)

    def wake_again(self, parked: Parked) -> None:
        """Try to wake a strand that had no room; one that is parked no longer is left as it is."""
        if self.closed is not None or parked.over.done():
            return
        above: Branch | None = parked.branch
        while above is not None and above.going == 0:
            if above.may_go is not None and not above.may_go(parked):
                return
            above = above.parent
        assert parked.end is not None
        self._unpark(parked)
        parked.over.set_result(parked.end)

    def _tell_mixed(self) -> None:
        if self.closed is None and self.on_mixed is not None:
            self.on_mixed(self)

    def _unpark(self, parked: Parked) -> None:
        """Count a strand as going again."""
        parked.branch.park = None
        del self._parked[parked]
        self.go(parked.branch)

    def close(self, reason: str) -> None:
        """End every strand: the parked ones by Unwind, the working ones by cancelling their task.

        The strand that calls this ends itself, by raising Unwind.
        """
        if self.closed is not None:
            return
        self.closed = reason
        here = asyncio.current_task()
        for task, branch in list(self._by_task.items()):
            if branch.park is not None:
                if not branch.park.over.done():
                    branch.park.over.set_exception(Unwind(reason))
            elif reason != "parked" and task is not here:
                task.cancel()
