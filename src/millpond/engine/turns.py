"""Turns: who goes next where the fair order of a queue alone does not tell: in rooms of several queues, or by urgency.

Called by `claim` and `simulating`, in place of the admission alone. Pure: no I/O, no clock. Invariants: those of
`admission`; slots go in the order of their queue, as `urgency` has it where work is interactive; of a room that several
queues need, and that has not place for all, the next place goes to the org that has used it least over all queues, of
those that can have it now. What cannot have its turn yet is set aside, and the slot goes on to the next; at the end
nothing is aside that could go.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millpond.engine.accounts import Crossing
from millpond.engine.admission import (
    AS_EVER,
    Decision,
    Lane,
    Order,
    Pick,
    Share,
    Terms,
    admit,
    enter,
    help_others,
    members_of,
)
from millpond.engine.urgency import Urgency, UrgentOrder


def decide(
    shares: Sequence[Share],
    free: Mapping[str, int],
    terms: Terms = AS_EVER,
    crossings: Sequence[Crossing] = (),
    urgency: Urgency | None = None,
) -> Decision:
    """Pick work items for free slots, as `admit`; in turn where rooms are crossings, and by urgency."""
    if not crossings and urgency is None:
        return admit(shares, free, terms)
    return _Turns(shares, free, terms, crossings, _orders(shares, urgency)).decide()


def _orders(shares: Sequence[Share], urgency: Urgency | None) -> dict[str, Order]:
    return {
        queue: Order(queue, members)
        if urgency is None or not any(lane.is_urgent for one in members for lane in one.lanes)
        else UrgentOrder(queue, members, urgency)
        for queue, members in members_of(shares).items()
    }


@dataclass(eq=False, slots=True)
class _Line:
    """A queue in this claim: its order, and how many slots it has left to fill just now."""

    order: Order
    slots: int
    is_live: bool = True


@dataclass(eq=False, slots=True)
class _Head:
    """A lane that needs a crossing, with where it stands."""

    line: _Line
    share: Share
    lane: Lane
    is_aside: bool = False
    has_left: bool = False

    @property
    def can_go(self) -> bool:
        """Whether it may still want a place in this claim."""
        if self.has_left or not self.line.is_live or self.lane.is_spent:
            return False
        return self.lane.full is None or self.is_aside


class _Contest:
    """The orgs that want places in one crossing, the one that has used it least first."""

    def __init__(self, crossing: Crossing) -> None:
        self.crossing = crossing
        self.is_contended = False
        self.heads: dict[int, list[_Head]] = {}
        self._heap: list[tuple[float, int]] = []
        self._wanted = 0

    def join(self, head: _Head) -> None:
        """Let a lane of an org take part."""
        org_id = head.share.org_id
        if org_id not in self.heads:
            self.heads[org_id] = []
            heapq.heappush(self._heap, (self.crossing.at_s(org_id), org_id))
        self.heads[org_id].append(head)
        self._wanted += len(head.lane.items) - head.lane.taken
        self.is_contended = self._wanted + self.crossing.riders > self.crossing.room.left

    def first(self) -> int | None:
        """Return the org whose turn it is."""
        heap = self._heap
        while heap:
            at_s, org_id = heap[0]
            if not any(head.can_go for head in self.heads[org_id]):
                heapq.heappop(heap)
            elif at_s == self.crossing.at_s(org_id):
                return org_id
            else:  # it has had a place since
                heapq.heapreplace(heap, (self.crossing.at_s(org_id), org_id))
        return None

    def charge(self, share: Share, lane: Lane) -> None:
        """Let an org have used a place."""
        cost_s = lane.use_s(self.crossing.room) / share.weight
        self.crossing.use(share.org_id, cost_s)


class _Turns:
    """One decision."""

    def __init__(
        self,
        shares: Sequence[Share],
        free: Mapping[str, int],
        terms: Terms,
        crossings: Sequence[Crossing],
        orders: Mapping[str, Order],
    ) -> None:
        self._shares = shares
        self._free = free
        self._terms = terms
        self._crossings = crossings
        self._orders = orders
        self._decision = Decision(picks=[], clocks={}, has_more=False)
        self._contests: dict[int, _Contest] = {}
        self._heads: dict[int, _Head] = {}

    def decide(self) -> Decision:
        """Fill each queue's own slots in turn, then let idle ones help other queues."""
        lines = [_Line(order, self._free.get(queue, 0)) for queue, order in self._orders.items()]
        for line in lines:
            line.order.left = line.slots
        self._fill(lines, None)
        for line in lines:
            line.order.left = line.slots
        if self._terms.helps:
            help_others(self._orders, self._free, self._decision, self._terms, self._help)
        return self._decision

    def _help(self, order: Order, slots: int, helper: str) -> int:
        line = _Line(order, slots)
        self._fill([line], helper)
        return slots - line.slots

    def _fill(self, lines: Sequence[_Line], helper: str | None) -> None:
        """Let queues take turns: each goes on until its next one has to wait for the turn of another."""
        self._gather(lines)
        live = deque(line for line in lines if line.slots > 0)
        for line in lines:
            line.is_live = line.slots > 0
        idle = 0
        while live:
            line = live[0]
            has_moved = line.is_live and self._advance(line, helper)
            if not line.is_live:
                live.popleft()
                self._release()
                idle = 0
                continue
            live.rotate(-1)
            idle = 0 if has_moved else idle + 1
            if idle >= len(live):
                if not self._force(live, helper):
                    break
                idle = 0
        self._end()

    def _gather(self, lines: Sequence[_Line]) -> None:
        """See which lanes want places in crossings."""
        for one in self._crossings:
            one.begin(self._shares)
        self._contests = {id(one.room): _Contest(one) for one in self._crossings}
        self._heads = {}
        by_queue = {line.order.queue: line for line in lines if line.slots > 0}
        for share in self._shares:
            line = by_queue.get(share.queue)
            if line is None:
                continue
            for lane in share.lanes:
                if not lane.can_go:
                    continue
                head = _Head(line, share, lane)
                for contest in self._met(lane):
                    self._heads[id(lane)] = head
                    contest.join(head)

    def _met(self, lane: Lane) -> list[_Contest]:
        return [one for room in lane.rooms if (one := self._contests.get(id(room))) is not None]

    def _advance(self, line: _Line, helper: str | None) -> bool:
        """Let orgs of a queue go until one has to wait; returns whether anything moved."""
        order, queue = line.order, line.order.queue
        reserved = self._terms.reserved.get(queue, 0) if helper is None else 0
        clock_s = self._terms.clocks.get(queue, 0.0)
        has_moved = False
        while (key := order.key) is not None:
            if line.slots <= reserved and key > max(clock_s, self._decision.clocks.get(queue, 0.0)):
                self._decision.is_held_back = True
                line.is_live = False
                return True
            at_s, share, lane = order.pop()
            has_moved = True
            if self._waits(share, lane):
                order.push(share)
                return True
            self._go(line, share, lane, at_s, helper)
            if line.slots <= 0:
                line.is_live = False
                return True
        return has_moved

    def _waits(self, share: Share, lane: Lane) -> bool:
        """Set a lane aside that has place in all of its rooms, and whose turn it is not in one of them."""
        if not (met := self._met(lane)) or not _has_place(share, lane):
            return False
        line = next((room.line for room in lane.rooms if room.line is not None), None)
        if line is not None:
            # What its org uses by a step that goes before it counts for its turn.
            line.let_before(share, lane)
            if not _has_place(share, lane):
                return False
        for contest in met:
            if contest.is_contended and contest.first() != share.org_id:
                self._heads[id(lane)].is_aside = True
                lane.full = contest.crossing.room
                return True
        return False

    def _go(
        self, line: _Line, share: Share, lane: Lane, clock_s: float, helper: str | None
    ) -> None:
        """Let the next item of a lane go, unless a room is full; the queue's clock is then at least at `clock_s`."""
        order, decision = line.order, self._decision
        met = self._met(lane)
        if lane.rooms and not enter(share, lane):
            order.push(share)
        else:
            cost_s = lane.estimate_s / share.weight
            rank, item_id = lane.ranks[lane.taken], lane.items[lane.taken]
            decision.picks.append(Pick(share.org_id, lane.lane_id, rank, item_id, helper))
            lane.taken += 1
            line.slots -= 1
            decision.clocks[order.queue] = max(decision.clocks.get(order.queue, clock_s), clock_s)
            share.virtual_s += cost_s
            for contest in met:
                contest.charge(share, lane)
            order.went(share, lane)
            if lane.is_spent and not lane.is_whole:
                # What stands behind is unknown, so the org's next item is: it goes on in the next claim.
                decision.has_more = order.is_cut = True
                self._leave(share)
            else:
                order.push(share)
        if met:
            self._release()

    def _leave(self, share: Share) -> None:
        """Let all that an org has left here wait for the next claim."""
        for lane in share.lanes:
            if (head := self._heads.get(id(lane))) is not None:
                head.has_left = True

    def _release(self) -> None:
        """Put back into the order of its queue what was set aside and has its turn now."""
        for contest in self._contests.values():
            org_id = contest.first() if contest.is_contended else None
            for head in contest.heads.get(org_id, ()) if org_id is not None else ():
                if head.is_aside and head.lane.full is contest.crossing.room and head.can_go:
                    self._return(head)

    def _return(self, head: _Head) -> None:
        head.is_aside = False
        head.lane.full = None
        head.line.order.drop(head.share)
        head.line.order.push(head.share)

    def _force(self, live: Iterable[_Line], helper: str | None) -> bool:
        """Let one go of those that wait for each other; returns whether there was one."""
        waiting = [head for head in self._heads.values() if head.is_aside and head.can_go]
        if not waiting:
            return False
        head = min(waiting, key=self._standing)
        head.is_aside = False
        head.lane.full = None
        head.line.order.drop(head.share)
        key = head.line.order.key
        clock_s = head.share.virtual_s if key is None else min(key, head.share.virtual_s)
        self._go(head.line, head.share, head.lane, clock_s, helper)
        if head.line.slots <= 0:
            head.line.is_live = False
        return True

    def _standing(self, head: _Head) -> tuple[float, int, int]:
        org_id = head.share.org_id
        at_s = max(contest.crossing.at_s(org_id) for contest in self._met(head.lane))
        return at_s, org_id, head.lane.lane_id

    def _end(self) -> None:
        """Leave what is aside: under its room where that is full by now, else where it stood."""
        for head in self._heads.values():
            if head.is_aside:
                head.is_aside = False
                room = head.lane.full
                assert room is not None
                if room.has_for((head.share.org_id, head.lane.lane_id)):
                    head.lane.full = None
                else:
                    head.lane.was_full = True


def _has_place(share: Share, lane: Lane) -> bool:
    """Whether all rooms of a lane have place for its next item."""
    place = (share.org_id, lane.lane_id)
    return all(room.has_for(place, lane.cost(room)) for room in lane.rooms)
