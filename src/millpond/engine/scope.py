"""Scope: what one worker gives to all its attempts, and what it knows of their steps under way.

Made by `worker`. Invariant: what stands here belongs to one session of one worker.
"""

from __future__ import annotations

import asyncio
import heapq
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from millpond.db.pool import EngineDatabase
from millpond.engine.commit import Committer
from millpond.engine.deltas import Deltas
from millpond.engine.family import Family
from millpond.engine.hints import Hints
from millpond.engine.leasehold import Leasehold
from millpond.engine.placing import Placing
from millpond.engine.plans import Plan
from millpond.engine.resting import Resting
from millpond.engine.riding import Riding
from millpond.engine.rights import Asking
from millpond.engine.settling import Settler
from millpond.engine.throttling import Throttling
from millpond.engine.vault import Vault
from millpond.engine.waking import Mixed

# A step that lasts longer is announced by an event of its own.
ANNOUNCE_S = 0.05
_SPARE = 256
# Of so many steps of a flow it is remembered that their flows go on after them; then that is learned anew.
_MAX_PASSED = 10_000


class Passed:
    """Steps after which their flows went on, by flow and step key: their results are not held for an end again."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], PassedOf] = {}

    def of(self, flow: tuple[str, int]) -> PassedOf:
        """Return those of a flow."""
        found = self._of.get(flow)
        if found is None:
            found = self._of[flow] = PassedOf()
        return found


class PassedOf(set[str]):
    """Those of one flow, by step key."""

    def add(self, step_key: str) -> None:
        """Note that the flow went on after a step."""
        if len(self) >= _MAX_PASSED:
            self.clear()
        super().add(step_key)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What one worker gives to all its attempts. `resources` are instances by their type."""

    database: EngineDatabase
    committer: Committer
    hints: Hints
    settler: Settler
    deltas: Deltas
    family: Family
    resting: Resting
    placing: Placing
    throttling: Throttling
    riding: Riding
    worker_id: uuid.UUID
    resources: Mapping[type, object]
    labels: Mapping[str, str] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    under_way: dict[Plan, UnderWay] = field(default_factory=dict)
    timed: Deadlines = field(default_factory=lambda: Deadlines())
    asking: Asking = field(default_factory=lambda: Asking(None))
    mixed: Mixed = field(default_factory=Mixed)
    passed: Passed = field(default_factory=Passed)
    vault: Vault | None = None
    leasehold: Leasehold = field(default_factory=Leasehold)


@dataclass(eq=False, slots=True)
class Timed:
    """A step under way with a time limit: `deadline` is on the clock of `time.monotonic`, as the pulse is."""

    deadline: float
    is_over: bool = False


class Deadlines:
    """By when steps under way have to be over; `tell` hears of the first one whenever that changes.

    At once, and not by a loop now and then: a step may block the loop from its first moment on.
    """

    def __init__(self, tell: Callable[[float | None], None] = lambda _: None) -> None:
        self._tell = tell
        self._heap: list[tuple[float, int, Timed]] = []
        self._nth = self._live = 0

    @property
    def first(self) -> float | None:
        """The first deadline, None while no step under way has one."""
        return self._heap[0][0] if self._heap else None

    def add(self, deadline: float) -> Timed:
        """Note that a step with a time limit begins."""
        timed = Timed(deadline)
        self._nth, self._live = self._nth + 1, self._live + 1
        heapq.heappush(self._heap, (deadline, self._nth, timed))
        if self._heap[0][2] is timed:
            self._tell(deadline)
        return timed

    def end(self, timed: Timed) -> None:
        """Note that a step is over."""
        timed.is_over = True
        self._live -= 1
        if self._heap[0][2] is timed:
            while self._heap and self._heap[0][2].is_over:
                heapq.heappop(self._heap)
            self._tell(self.first)
        elif len(self._heap) > 2 * self._live + _SPARE:
            # Those behind a long step would else stay until it ends.
            self._heap = [one for one in self._heap if not one[2].is_over]
            heapq.heapify(self._heap)


# When a try began, on the loop's clock, and what tells of it. The oldest is first. Each leaves as it is over or told
# of: one that stayed would keep all its attempt is made of, which is soon used anew while caches hold it.
UnderWay: TypeAlias = tuple[float, Callable[[Plan], None]]


def announce(under_way: dict[Plan, UnderWay], now: float) -> None:
    """Tell of tries that have lasted a while; called now and then, so that short ones cost nothing."""
    due = []
    for plan, (began, tell_started) in under_way.items():
        if now - began < ANNOUNCE_S:
            break
        due.append((plan, tell_started))
    for plan, tell_started in due:
        del under_way[plan]
        tell_started(plan)
