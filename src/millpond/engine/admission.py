"""Admission: which ready work items go next, in fair order, with all limits at once. Pure: no I/O, no clock.

Called by `claim` inside its transaction. Invariants: never more picks than a queue has free slots, nor
than a room has left; an item takes all its rooms or none; within a lane items go in order; orgs go by
the virtual time at which their turns begin, lanes of one org by the rank of their heads; a turn is one item, or small
ones of `TURN_S` together; what could go goes, but for room that is kept and slots that are. A slot helps
another queue only when its own has nothing more that can go.
Start-time fair queueing: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from millpond.engine.estimates import TURN_S


class Line(Protocol):
    """Those that wait for room beside the lanes and need no slot (`seats`)."""

    def let_before(self, share: Share, lane: Lane) -> None:
        """Let those take their places that the next item of a lane may not pass, as it is about to go."""


@dataclass(kw_only=True, slots=True)
class Room:
    """How many more may go under one limit; one of them is kept for the head of a lane that waited long.

    `org_id` is the org whose work alone takes places here, 0 where others' does too. Where it `is_weighed`, an item
    takes as many as its lane needs, and as many are `kept` as the head does. In `line` wait tries of steps; `spared`
    places are left for those of other workers.
    """

    left: int
    org_id: int = 0
    kept_for: tuple[int, int] | None = None
    name: str = ""
    went: int = 0
    is_weighed: bool = False
    kept: int = 1
    line: Line | None = None
    spared: int = 0

    def cost(self, need: int) -> int:
        """Return how many an item takes whose lane needs so many where it is weighed."""
        return need if self.is_weighed else 1

    def has_for(self, place: tuple[int, int], cost: int = 1) -> bool:
        """Whether one more item of the lane `place` (org, lane) may go that takes so many."""
        if self.kept_for is None or self.kept_for == place:
            return self.left >= cost
        return self.left >= cost + self.kept


def need_in(room: Room, need: int, needs: Mapping[str, int] | None) -> int:
    """Return the need for a room, where it is weighed: that of its name, else of the lane."""
    return need if needs is None else needs.get(room.name, need)


@dataclass(kw_only=True, slots=True)
class Lane:
    """The head of one lane as read: `ranks` and `items` side by side, in order.

    `is_whole` says that nothing ready stands behind what was read; `estimate_s` is the expected
    service of one item, in worker-seconds. Each item takes one of each of `rooms`; where these are weighed
    `need`, or what `needs` has by the room's name, which is what a step in line takes itself. `full` is the
    room for want of which the lane's next item cannot go, `was_full` whether that was ever so in this claim.
    Somebody waits for work that `is_urgent`: of the class interactive.
    Of those taken so many went `together` with others, as steps of one run. `able` is what a worker needs for them.
    `tries` has, by name, the rooms in which not the item has its place but the step for whose sake it goes, with the
    expected use of a try, in worker-seconds.
    """

    lane_id: int
    offset_us: int
    ranks: Sequence[int]
    items: Sequence[uuid.UUID]
    is_whole: bool
    estimate_s: float
    taken: int = 0
    rooms: Sequence[Room] = ()
    full: Room | None = None
    was_full: bool = False
    is_urgent: bool = False
    need: int = 1
    needs: Mapping[str, int] | None = None
    together: int = 0
    tries: Mapping[str, float] | None = None
    able: str = ""

    def cost(self, room: Room) -> int:
        """Return how many each item takes of a room."""
        return room.cost(need_in(room, self.need, self.needs))

    def use_s(self, room: Room) -> float:
        """Return for how long an item is expected to have its place in a room, in worker-seconds."""
        return self.estimate_s if self.tries is None else self.tries.get(room.name, self.estimate_s)

    def used_s(self, room: Room) -> float:
        """Return for how long those taken are expected to have theirs, in worker-seconds."""
        if self.tries is not None and room.name in self.tries:
            return self.taken * self.tries[room.name]
        return (self.taken - self.together) * self.estimate_s

    @property
    def is_spent(self) -> bool:
        """Whether every item that was read has been taken."""
        return self.taken >= len(self.items)

    @property
    def can_go(self) -> bool:
        """Whether there is a next item, and no room that it needs was found full."""
        return self.full is None and self.taken < len(self.items)

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
    """A ready work item that shall go; `helper` is the queue whose slot it takes, where that is not its own."""

    org_id: int
    lane_id: int
    rank: int
    item_id: uuid.UUID
    helper: str | None = None


@dataclass(kw_only=True, slots=True)
class Decision:
    """What a claim shall write: picks, the queues' virtual clocks, and whether more could go.

    `is_held_back` says that work stayed behind for want of a slot that is not reserved.
    """

    picks: list[Pick]
    clocks: dict[str, float]
    has_more: bool
    is_held_back: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """On what terms free slots are filled; by default each by work of its own queue, whosever it is.

    `helps` names, by helper, the queues that its idle slots help, in order; `kept` is how many free slots a helper
    keeps to itself, `reserved` the part of them that only orgs take which would go before one that arrives now, by the
    `clocks` of their queues. A queue that is `unread` may have more work than was read, and helps nobody now. Where a
    queue has a horizon (virtual time, org), orgs that stand behind it were not read, and nobody goes from there.
    """

    helps: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    reserved: Mapping[str, int] = field(default_factory=dict)
    clocks: Mapping[str, float] = field(default_factory=dict)
    unread: AbstractSet[str] = frozenset()
    horizons: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def most(self, free: Mapping[str, int]) -> dict[str, int]:
        """Return how many slots the work of each queue can have at most; queues that can have none are left out."""
        most = {queue: slots for queue, slots in free.items() if slots > 0}
        for helper, helped in self.helps.items():
            idle = free.get(helper, 0) - self.kept.get(helper, 0)
            if idle > 0:
                for queue in helped:
                    most[queue] = most.get(queue, 0) + idle
        return most

    def unreserved(self, free: Mapping[str, int]) -> dict[str, int]:
        """Return the slots of each queue that any org may take; queues without any are left out."""
        left = {queue: slots - self.reserved.get(queue, 0) for queue, slots in free.items()}
        return {queue: slots for queue, slots in left.items() if slots > 0}


AS_EVER = Terms()

# How many items go at one turn at most.
TURN_ITEMS = 8


def admit(shares: Sequence[Share], free: Mapping[str, int], terms: Terms = AS_EVER) -> Decision:
    """Pick work items for the free slots of each queue; moves `taken` and `virtual_s` forward."""
    decision = Decision(picks=[], clocks={}, has_more=False)
    orders = {queue: Order(queue, members) for queue, members in members_of(shares).items()}
    for queue, order in orders.items():
        order.left = free.get(queue, 0)
        _serve(order, decision, order.left, terms)
    if terms.helps:

        def serve(order: Order, slots: int, helper: str) -> int:
            return _serve(order, decision, slots, terms, helper)

        help_others(orders, free, decision, terms, serve)
    return decision


def pass_over(shares: Sequence[Share], missed: Sequence[Pick], *, again: bool) -> None:
    """Take back picks that could not be had: they leave their lanes, and nobody is charged.

    Where it is decided `again`, lanes that found a room full try anew; else they stay under it.
    """
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
                for room in lane.rooms:
                    room.left += lost * lane.cost(room)
                    room.went -= lost * lane.cost(room)
    if gone and again:
        for share in shares:
            for lane in share.lanes:
                lane.full = None


class Order:
    """The orgs of one queue in fair order, and the slots of its own that are left.

    An org leaves it as what was read of it is gone; `is_cut` says that one left of which more may be ready.
    """

    __slots__ = ("heap", "is_cut", "left", "queue")

    def __init__(self, queue: str, members: Sequence[Share]) -> None:
        self.queue = queue
        self.heap = [(share.virtual_s, share.org_id, share) for share in members if has_head(share)]
        heapq.heapify(self.heap)
        self.left = 0
        self.is_cut = False

    @property
    def is_empty(self) -> bool:
        """Whether no org is left."""
        return not self.heap

    @property
    def key(self) -> float | None:
        """Where the org stands that comes first; None where none is left."""
        return self.heap[0][0] if self.heap else None

    def pop(self) -> tuple[float, Share, Lane]:
        """Take the org out that comes first; returns the queue's clock by it, and which of its lanes is next."""
        clock_s, _, share = heapq.heappop(self.heap)
        return clock_s, share, next_lane(share)

    def push(self, share: Share) -> None:
        """Put an org in that is not there, if it has an item that can go."""
        if has_head(share):
            heapq.heappush(self.heap, (share.virtual_s, share.org_id, share))

    def drop(self, share: Share) -> None:
        """Take an org out, wherever it stands, if it is there."""
        self.heap = [one for one in self.heap if one[2] is not share]
        heapq.heapify(self.heap)

    def went(self, share: Share, lane: Lane) -> None:
        """Note that an item of an org went; the org is not there then."""


def members_of(shares: Sequence[Share]) -> dict[str, list[Share]]:
    """Return the orgs of each queue that has any."""
    by_queue: dict[str, list[Share]] = {}
    for share in shares:
        by_queue.setdefault(share.queue, []).append(share)
    return by_queue


def help_others(
    orders: Mapping[str, Order],
    free: Mapping[str, int],
    decision: Decision,
    terms: Terms,
    serve: Callable[[Order, int, str], int],
) -> None:
    """Let slots that their own queues leave idle go to the queues that they help, in order.

    `serve` lets the orgs of a queue take so many slots of a helper at most, and returns how many they took.
    """
    for helper, helped in terms.helps.items():
        own = orders.get(helper)
        idle = (free.get(helper, 0) if own is None else own.left) - terms.kept.get(helper, 0)
        waiting = [
            orders[queue] for queue in helped if queue in orders and not orders[queue].is_empty
        ]
        if idle <= 0 or not waiting:
            continue
        if helper in terms.unread or (own is not None and own.is_cut):
            # Its own work goes first: the next claim reads on.
            decision.has_more = True
            continue
        for order in waiting:
            idle -= serve(order, idle, helper)


def _serve(
    order: Order, decision: Decision, slots: int, terms: Terms, helper: str | None = None
) -> int:
    """Let the orgs of a queue take slots, its own or a helper's, in fair order; returns how many they took."""
    queue, heap, first = order.queue, order.heap, len(decision.picks)
    reserved = terms.reserved.get(queue, 0) if helper is None else 0
    clock_s, horizon, is_held_back = terms.clocks.get(queue, 0.0), terms.horizons.get(queue), False
    while heap and slots > 0:
        if slots <= reserved and heap[0][0] > max(clock_s, decision.clocks.get(queue, 0.0)):
            decision.is_held_back = is_held_back = True
            break
        if horizon is not None and heap[0][:2] > horizon:
            break
        start, org_id, share = heapq.heappop(heap)
        lane = next_lane(share)
        if lane.rooms and not enter(share, lane):
            if has_head(share):
                heapq.heappush(heap, (start, org_id, share))
            continue
        decision.clocks[queue] = start
        before = len(decision.picks)
        most = min(TURN_ITEMS, slots - reserved)
        lane = _take_turn(share, lane, most, decision.picks, helper)
        slots -= len(decision.picks) - before
        if lane.is_spent and not lane.is_whole:
            # What stands behind is unknown, so the org's next item is: it goes on in the next claim.
            decision.has_more = order.is_cut = True
        elif has_head(share):
            heapq.heappush(heap, (share.virtual_s, org_id, share))
    if horizon is not None and slots > 0 and not is_held_back:
        # Who stands behind what was read has its turn in the next claim.
        decision.has_more = order.is_cut = True
    taken = len(decision.picks) - first
    if helper is None:
        order.left -= taken
    return taken


def _take_turn(share: Share, lane: Lane, most: int, picks: list[Pick], helper: str | None) -> Lane:
    """Let an org's next item go, which has its rooms, and more behind it while its turn lasts; returns the last's lane.

    A turn is one item, or as many as the org is charged no more than `TURN_S` for together.
    """
    end_s = share.virtual_s + TURN_S / share.weight
    while True:
        rank, item_id = lane.ranks[lane.taken], lane.items[lane.taken]
        picks.append(Pick(share.org_id, lane.lane_id, rank, item_id, helper))
        lane.taken += 1
        share.virtual_s += lane.estimate_s / share.weight
        most -= 1
        if most <= 0 or share.virtual_s >= end_s or (lane.is_spent and not lane.is_whole):
            return lane
        after = _next_within(share, end_s)
        if after is None:
            return lane
        lane = after


def _next_within(share: Share, end_s: float) -> Lane | None:
    """Return an org's next lane if its item is over by `end_s` and has its rooms, which it takes then."""
    if not has_head(share):
        return None
    lane = next_lane(share)
    if share.virtual_s + lane.estimate_s / share.weight > end_s:
        return None
    return None if lane.rooms and not enter(share, lane) else lane


def enter(share: Share, lane: Lane) -> bool:
    """Take one of each room of a lane, or note which of them is full and take none.

    Whoever waits in these rooms and is not to be passed takes its places first.
    """
    full = _full(share, lane)
    if full is None:
        line = next((room.line for room in lane.rooms if room.line is not None), None)
        if line is not None:
            line.let_before(share, lane)
            full = _full(share, lane)
    if full is not None:
        lane.full, lane.was_full = full, True
        return False
    place = (share.org_id, lane.lane_id)
    for room in lane.rooms:
        cost = lane.cost(room) if room.is_weighed else 1
        room.left -= cost
        room.went += cost
        if room.kept_for == place:
            room.kept_for = None
    return True


def _full(share: Share, lane: Lane) -> Room | None:
    """Return a room of a lane that has no place for its next item."""
    place = (share.org_id, lane.lane_id)
    for room in lane.rooms:
        if not room.has_for(place, lane.cost(room) if room.is_weighed else 1):
            return room
    return None


def next_lane(share: Share) -> Lane:
    """Return the org's lane whose head comes first; there is one."""
    if len(share.lanes) == 1:
        return share.lanes[0]
    return min((lane for lane in share.lanes if lane.can_go), key=lambda one: one.head)


def has_head(share: Share) -> bool:
    """Whether an org has an item that can go."""
    return any(lane.can_go for lane in share.lanes)
