"""Charges: what orgs used of a queue's worker time beyond what their claims were charged, until it is settled. Pure.

Counted by `slots` for one worker and by `simulating` on a virtual clock; no I/O, the clock's readings are passed in.
Invariant: what an attempt was charged by its claim and what is owed here come to the time that its code executed, also
while it still does; a difference too small to matter waits for more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

# How often what is owed is to be settled.
EVERY_S = 0.25
# Less than this of an org is not worth a write, in worker-seconds.
LEAST_S = 0.005


class Toll(NamedTuple):
    """What a claim has charged for a try of a step in rooms that several queues need, where it lets that begin.

    `queue` is that of its run, `work` names the work by which it was estimated.
    """

    queue: str
    rooms: tuple[str, ...]
    charged_s: float
    work: str


@dataclass(eq=False, slots=True)
class Use:
    """The time of one attempt: since when it executes, by the monotonic clock, and how many seconds are charged.

    `crossings` are rooms that several queues need, in which it is charged as in its queue. A try of a step `is_ridden`:
    it is charged there alone, since its attempt is in its queue.
    """

    org_id: int
    queue: str
    charged_s: float
    began: float
    crossings: tuple[str, ...] = ()
    is_ridden: bool = False


class Charges:
    """The differences of one worker that are not settled yet, by org and queue, in worker-seconds."""

    def __init__(self) -> None:
        self._owed: dict[tuple[int, str], float] = {}
        self._crossed: defaultdict[tuple[int, str, str], float] = defaultdict(float)
        self._live: dict[Use, None] = {}
        # Those of what is owed that are worth a write: of many orgs most owe less, and are not looked at.
        self._large: set[tuple[int, str]] = set()

    def begin(
        self,
        org_id: int,
        queue: str,
        estimate_s: float,
        began: float,
        crossings: tuple[str, ...] = (),
    ) -> Use:
        """Count an attempt in that its claim was charged by an estimate."""
        use = Use(org_id, queue, estimate_s, began, crossings)
        self._live[use] = None
        return use

    def begin_try(self, org_id: int, toll: Toll, began: float) -> Use:
        """Count a try of a step in that its claim was charged in crossings."""
        use = Use(org_id, toll.queue, toll.charged_s, began, toll.rooms, is_ridden=True)
        self._live[use] = None
        return use

    def refund(self, org_id: int, toll: Toll) -> None:
        """Give back what a claim charged for a try that was never begun."""
        for room in toll.rooms:
            self._crossed[org_id, toll.queue, room] -= toll.charged_s

    def end(self, use: Use, used_s: float) -> None:
        """Count it out: charge what it used beyond what it was charged, or give back what it did not use."""
        self._live.pop(use, None)
        self._owe(use, used_s)

    def go_on(self, use: Use, used_s: float, now: float) -> None:
        """Count it in again, after so many seconds: its code executes again from now on."""
        use.began = now - used_s
        self._live[use] = None

    def give_back(
        self, org_id: int, queue: str, charged_s: float, crossings: tuple[str, ...] = ()
    ) -> None:
        """Give back what a claim charged for work that was never begun: it is claimed, and charged, anew."""
        self._move(org_id, queue, -charged_s)
        for room in crossings:
            self._crossed[org_id, queue, room] -= charged_s

    def _owe(self, use: Use, used_s: float) -> None:
        if not use.is_ridden:
            self._move(use.org_id, use.queue, used_s - use.charged_s)
        for room in use.crossings:
            self._crossed[use.org_id, use.queue, room] += used_s - use.charged_s
        use.charged_s = used_s

    def _move(self, org_id: int, queue: str, by_s: float) -> None:
        key = org_id, queue
        owed_s = self._owed[key] = self._owed.get(key, 0.0) + by_s
        if not -LEAST_S < owed_s < LEAST_S:
            self._large.add(key)

    def take(self, now: float) -> dict[tuple[int, str], float]:
        """Return what is to be settled now, also of attempts that are under way, and count it as settled."""
        for use in self._live:
            if now - use.began > use.charged_s:
                self._owe(use, now - use.began)
        return self.take_ended(LEAST_S)

    def take_ended(self, least_s: float) -> dict[tuple[int, str], float]:
        """Return what is owed of attempts that are over, where it is so much, and count it as settled.

        That is at least `LEAST_S`.
        """
        owed = self._owed
        due = {key: owed[key] for key in self._large if abs(owed[key]) >= least_s}
        for key in due:
            del owed[key]
        self._large = {key for key in self._large - due.keys() if abs(owed[key]) >= LEAST_S}
        return due

    def take_crossed(self) -> dict[tuple[int, str, str], float]:
        """Return what is to be settled in crossings (org, queue, room), as of the last `take`; it counts as settled."""
        due = {key: owed for key, owed in self._crossed.items() if abs(owed) >= LEAST_S}
        for key in due:
            del self._crossed[key]
        return due

    @property
    def is_idle(self) -> bool:
        """Whether no attempt is under way: what is owed after a `take` then stays as it is."""
        return not self._live
