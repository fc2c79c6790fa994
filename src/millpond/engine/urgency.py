"""Urgency: the order of a queue in which some work is interactive: somebody waits for it. Pure: no I/O, no clock.

Called by `turns`. Invariants: an org is never further ahead of another by this than the lead, in virtual seconds; while
a standard head has waited longer than `AGING_S`, every second slot goes as if nothing were interactive, and every
second turn of an org with such a head to that head. Borrowed virtual time: Duda, Cheriton, "Borrowed-Virtual-Time
(BVT) scheduling", SOSP 1999.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from millpond.engine.admission import Lane, Order, Share, has_head, next_lane

# So long a standard head waits before it has its part of the slots whatever is interactive.
AGING_S = 10.0
# By default interactive work goes as if its org had used so many seconds less, over its weight.
LEAD_S = 30.0


@dataclass(kw_only=True, slots=True)
class Urgency:
    """How interactive work goes before other work, and what is remembered from one claim to the next.

    `owed` are queues whose next slot goes as if nothing were interactive; `owing` orgs (queue, org) whose next turn is
    that of standard work. Both are moved forward.
    """

    lead_s: float
    now_us: int
    owed: set[str] = field(default_factory=set)
    owing: set[tuple[str, int]] = field(default_factory=set)

    def is_aged(self, lane: Lane) -> bool:
        """Whether a lane has a standard head that can go and has waited long."""
        if lane.is_urgent or not lane.can_go:
            return False
        return self.now_us - lane.ranks[lane.taken] > AGING_S * 1e6


class UrgentOrder(Order):
    """The orgs of one queue in fair order; those with interactive heads stand in it by the lead earlier, too.

    An org has a stamp that grows as it is put in or taken out, so that earlier places of it count nothing.
    """

    __slots__ = ("_ahead", "_has_aged", "_is_led", "_plain", "_stamps", "_urgency")

    def __init__(self, queue: str, members: Sequence[Share], urgency: Urgency) -> None:
        super().__init__(queue, ())
        self._urgency = urgency
        self._plain: list[tuple[float, int, int, Share]] = []
        self._ahead: list[tuple[float, int, int, Share]] = []
        self._stamps: dict[int, int] = {}
        self._is_led = False
        self._has_aged = any(urgency.is_aged(lane) for share in members for lane in share.lanes)
        for share in members:
            self.push(share)

    @property
    def is_empty(self) -> bool:
        """Whether no org is left."""
        return self._top(self._plain) is None

    @property
    def key(self) -> float | None:
        """Where the org stands that comes first; None where none is left."""
        first = self._first()
        return None if first is None else first[0]

    def pop(self) -> tuple[float, Share, Lane]:
        """Take the org out that comes first; returns the queue's clock by it, and which of its lanes is next.

        Who goes by the lead moves the clock on from where that begins.
        """
        first = self._first()
        assert first is not None
        clock_s, _, _, share = first
        self._is_led = first is self._top(self._ahead)
        self.drop(share)
        return clock_s, share, self._next(share)

    def push(self, share: Share) -> None:
        """Put an org in that is not there, if it has an item that can go."""
        if not has_head(share):
            return
        stamp = self._stamps[id(share)] = self._stamps.get(id(share), 0) + 1
        place = (share.virtual_s, share.org_id, stamp, share)
        heapq.heappush(self._plain, place)
        if any(lane.is_urgent and lane.can_go for lane in share.lanes):
            ahead = (share.virtual_s - self._urgency.lead_s, share.org_id, stamp, share)
            heapq.heappush(self._ahead, ahead)

    def drop(self, share: Share) -> None:
        """Take an org out, wherever it stands, if it is there."""
        self._stamps[id(share)] = self._stamps.get(id(share), 0) + 1

    def went(self, share: Share, lane: Lane) -> None:
        """Note that an item of an org went; the org is not there then."""
        urgency, place = self._urgency, (self.queue, share.org_id)
        if self._is_led and lane.is_urgent and self._has_aged:
            urgency.owed.add(self.queue)
        else:
            urgency.owed.discard(self.queue)
        if lane.is_urgent and any(urgency.is_aged(one) for one in share.lanes):
            urgency.owing.add(place)
        else:
            urgency.owing.discard(place)

    def _first(self) -> tuple[float, int, int, Share] | None:
        plain = self._top(self._plain)
        ahead = self._top(self._ahead)
        if ahead is None or plain is None or (self._has_aged and self.queue in self._urgency.owed):
            return plain
        return ahead if ahead[0] <= plain[0] else plain

    def _top(
        self, heap: list[tuple[float, int, int, Share]]
    ) -> tuple[float, int, int, Share] | None:
        while heap and self._stamps[id(heap[0][3])] != heap[0][2]:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _next(self, share: Share) -> Lane:
        """Return which lane of an org goes: interactive ones and those with aged heads take turns."""
        urgent = [lane for lane in share.lanes if lane.is_urgent and lane.can_go]
        if not urgent:
            return next_lane(share)
        if (self.queue, share.org_id) in self._urgency.owing:
            aged = [lane for lane in share.lanes if self._urgency.is_aged(lane)]
            urgent = aged or urgent
        return min(urgent, key=lambda one: one.head)
