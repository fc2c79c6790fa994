"""Accounts: what orgs have used of a room that work of several queues needs. Pure: no I/O, no clock.

Kept by `crossings` and `standing` for a claim; `turns` lets lanes go by them, `seats` tries of steps. Invariant:
whoever is given a place has its expected use on its account before the next place is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from millpond.engine.admission import Room, Share

# So far an org whose work waits may be behind the clock of a crossing, in virtual seconds.
CREDIT_S = 60.0


@dataclass(kw_only=True, slots=True)
class Crossing:
    """What orgs have used of a room that lanes of several queues need, as virtual times.

    In worker-seconds over weight, over all queues, as stored before this claim. An org that is not there, or is behind
    `since_s`, begins there: idle time is no credit. One whose work is `waiting` there is not idle, and may be behind by
    what it was given back; by what it could not use for other reasons, no more than `CREDIT_S`. `clock_s` is where the
    last pick began. `riders` tries of steps wait there beside the lanes; `ridden_s` is what those use by org that this
    claim lets begin, `spared_s` what those would to which it leaves a place.
    """

    room: Room
    since_s: float
    virtual_s: Mapping[int, float] = field(default_factory=dict)
    waiting: AbstractSet[int] = frozenset()
    clock_s: float = 0.0
    riders: int = 0
    ridden_s: dict[int, float] = field(default_factory=dict)
    spared_s: dict[int, float] = field(default_factory=dict)
    _now_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock_s = max(self.clock_s, self.since_s)

    def began_s(self, org_id: int) -> float:
        """Return where an org stands before anything of this claim goes."""
        return stands_s(self.since_s, self.virtual_s.get(org_id), is_waiting=org_id in self.waiting)

    def reached(self, shares: Iterable[Share]) -> dict[int, float]:
        """Return where orgs stand of which work goes in this claim."""
        used = dict(self.ridden_s)
        for share in shares:
            for lane in share.lanes:
                if lane.taken and any(room is self.room for room in lane.rooms):
                    _add(used, share.org_id, lane.used_s(self.room) / share.weight)
        return {org_id: self.began_s(org_id) + used_s for org_id, used_s in used.items()}

    def begin(self, shares: Iterable[Share]) -> None:
        """Let orgs stand where what goes so far in this claim has brought them."""
        self._now_s = self.reached(shares)
        for org_id, used_s in self.spared_s.items():
            self._now_s[org_id] = self.at_s(org_id) + used_s

    def at_s(self, org_id: int) -> float:
        """Return where an org stands by now."""
        found = self._now_s.get(org_id)
        return self.began_s(org_id) if found is None else found

    def use(self, org_id: int, cost_s: float) -> None:
        """Let an org have a place by now."""
        start_s = self.at_s(org_id)
        self.clock_s = max(self.clock_s, start_s)
        self._now_s[org_id] = start_s + cost_s

    def ride(self, org_id: int, cost_s: float) -> None:
        """Let a try of a step of an org have a place by this claim."""
        self.use(org_id, cost_s)
        _add(self.ridden_s, org_id, cost_s)

    def spare(self, org_id: int, cost_s: float) -> None:
        """Leave a place to a try of a step of an org, which its own worker's claim charges."""
        self._now_s[org_id] = self.at_s(org_id) + cost_s
        _add(self.spared_s, org_id, cost_s)

    def give_back(self, org_id: int, cost_s: float) -> None:
        """Take back what a try was charged that does not begin after all."""
        _add(self.ridden_s, org_id, -cost_s)


def _add(to: dict[int, float], org_id: int, used_s: float) -> None:
    to[org_id] = to.get(org_id, 0.0) + used_s


def stands_s(clock_s: float, virtual_s: float | None, *, is_waiting: bool) -> float:
    """Return where an org stands in a crossing with such a clock."""
    if virtual_s is None:
        return clock_s
    return max(virtual_s, clock_s - CREDIT_S if is_waiting else clock_s)
