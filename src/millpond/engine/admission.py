"""Admission: which ready work items go next, in fair order. Pure: no I/O, no clock.

Called by `claim` inside its transaction. Invariants: never more picks than a queue has free slots;
within a lane items go in order; orgs go by virtual time, lanes of one org by the rank of their heads.
Start-time fair queueing: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(kw_only=True, slots=True)
class Lane:
    """The head of one lane as read: `ranks` and `items` side by side, in order.

    `is_whole` says that nothing ready stands behind what was read; `estimate_s` is the expected
    service of one item, in worker-seconds.
    """

    lane_id: int
    offset_us: int
    ranks: Sequence[int]
    items: Sequence[uuid.UUID]
    is_whole: bool
    estimate_s: float
    taken: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether every item that was read has been taken."""
        return self.taken >= len(self.items)

    @property
    def head(self) -> int:
        """The rank of the next item, comparable among lanes of one org."""
        return self.ranks[self.taken] + self.offset_us


@dataclass(kw_only=True, slots=True)
class Share:
    """One org's place in a queue's fair order and the lanes it has there."""

    queue: str
    org_id: int
    weight: float
    virtual_s: float
    lanes: list[Lane] = field(default_factory=list)


class Pick(NamedTuple):
    """A ready work item that shall go."""

    org_id: int
    lane_id: int
    rank: int
    item_id: uuid.UUID


@dataclass(kw_only=True, slots=True)
class Decision:
    """What a claim shall write: picks, the queues' virtual clocks, and whether more could go."""

    picks: list[Pick]
    clocks: dict[str, float]
    has_more: bool


def admit(shares: Sequence[Share], free: Mapping[str, int]) -> Decision:
    """Pick work items for the free slots of each queue; moves `taken` and `virtual_s` forward."""
    decision = Decision(picks=[], clocks={}, has_more=False)
    by_queue: dict[str, list[Share]] = {}
    for share in shares:
        by_queue.setdefault(share.queue, []).append(share)
    for queue, members in by_queue.items():
        _admit_queue(queue, members, free.get(queue, 0), decision)
    return decision


def pass_over(shares: Sequence[Share], missed: Sequence[Pick]) -> None:
    """Take back picks that could not be had: they leave their lanes, and nobody is charged."""
    gone = {(pick.org_id, pick.item_id) for pick in missed}
    for share in shares:
        for lane in share.lanes:
            kept = [
                (rank, item)
                for rank, item in zip(lane.ranks, lane.items, strict=True)
                if (share.org_id, item) not in gone
            ]
            lost = len(lane.items) - len(kept)
            if lost:
                lane.ranks, lane.items = [rank for rank, _ in kept], [item for _, item in kept]
                lane.taken -= lost
                share.virtual_s -= lost * lane.estimate_s / share.weight


def _admit_queue(queue: str, members: list[Share], slots: int, decision: Decision) -> None:
    order = [(share.virtual_s, share.org_id, share) for share in members if _has_head(share)]
    heapq.heapify(order)
    while order and slots > 0:
        start, org_id, share = heapq.heappop(order)
        lane = _next_lane(share)
        decision.picks.append(
            Pick(org_id, lane.lane_id, lane.ranks[lane.taken], lane.items[lane.taken])
        )
        lane.taken += 1
        slots -= 1
        decision.clocks[queue] = start
        share.virtual_s = start + lane.estimate_s / share.weight
        if lane.is_spent and not lane.is_whole:
            # What stands behind is unknown, so the org's next item is: it goes on in the next claim.
            decision.has_more = True
        elif not lane.is_spent or _has_head(share):
            heapq.heappush(order, (share.virtual_s, org_id, share))


def _next_lane(share: Share) -> Lane:
    """Return the org's lane whose head comes first; there is one."""
    if len(share.lanes) == 1:
        return share.lanes[0]
    return min((lane for lane in share.lanes if not lane.is_spent), key=lambda one: one.head)


def _has_head(share: Share) -> bool:
    return any(not lane.is_spent for lane in share.lanes)
