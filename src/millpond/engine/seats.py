"""Seats: which tries of steps begin with the room of a claim, and that nothing passes those that wait. Pure.

Called by `boarding`, and by `admission` before anything in line goes on. Invariants: a try takes a place in all the
rooms it needs or in none; it takes none that somebody needs who stood in line before it and could go, nor one that is
kept; what stands behind it in line takes none that it could have, whichever worker's claim this is; one that is refused
holds up nobody; of branches under one bound no more begin than have a place there. No I/O, no clock.

Behind a try that waits stands what came later: of its own org also by priority, of another org in the same queue only
where that one has not had less of the queue. In rooms that several queues need it goes before orgs that have used these
more, whichever queue they are in, and what it uses counts there.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millpond.engine.accounts import Crossing
from millpond.engine.admission import Lane, Room, Share
from millpond.engine.bounds import Bounds, take

# Of so many that wait each claim sees to it that nobody passes them; the others go after the work in line.
_MOST = 128

_At = tuple[int, str, int, float]  # org, queue, offset, virtual time
_Like = tuple[str, int, tuple[int, str, int] | None]  # room, need, whose of those that wait
_Head = tuple[
    str, _At, Sequence[int], int, float
]  # queue, where it stands, ranks, what an item takes and uses


@dataclass(kw_only=True, slots=True, eq=False)
class Want:
    """A try that needs a place in each of `rooms`, or `need` where one is weighed; `full` is the one that has too few.

    `since_us` is its place in line, None where it has just come; `offset_us` that of its run's priority, `virtual_s`
    where its org stands in its queue. Places that are kept for `place` are its own. What is not `is_here` waits in
    another worker: where it `has_gone`, its places are only left for it, until that worker claims. `crossings` are
    those of its rooms that several queues need; it is expected to `use_s` there, in worker-seconds over weight, by its
    run's capability `able`. It needs a place in each of its `bounds` too: where it could go but for these, it
    `is_beyond` them and takes nothing.
    """

    rooms: Sequence[Room]
    org_id: int = 0
    queue: str = ""
    since_us: int | None = None
    offset_us: int = 0
    virtual_s: float = 0.0
    need: int = 1
    place: tuple[int, int] | None = None
    is_here: bool = True
    full: Room | None = None
    has_gone: bool = False
    able: str = ""
    crossings: Sequence[Crossing] = ()
    use_s: float = 0.0
    bounds: Bounds = ()
    is_beyond: bool = False


class Elder(NamedTuple):
    """A lane under a room, with the ranks of its first items; other workers have so many free `slots` for these.

    Each takes `cost` of the room, and is expected to use it for `use_s`, in worker-seconds over weight.
    """

    room: str
    org_id: int
    lane_id: int
    queue: str
    offset_us: int
    virtual_s: float
    slots: int
    ranks: Sequence[int]
    cost: int = 1
    use_s: float = 0.0


class Line:
    """The tries that want room in one claim, beside the lanes that it looks at and the `elders`, which it may not.

    `free` are the claim's own slots by queue.
    """

    def __init__(
        self,
        wants: Sequence[Want],
        elders: Sequence[Elder] = (),
        shares: Sequence[Share] = (),
        free: Mapping[str, int] | None = None,
    ) -> None:
        self._waiting = sorted(
            (one for one in wants if one.since_us is not None), key=lambda one: one.since_us or 0
        )
        self._fresh = [one for one in wants if one.since_us is None]
        self._shares = {(one.queue, one.org_id): one for one in shares}
        self._free = dict(free or {})
        self._left: dict[str, int] = {}
        self._elders: dict[str, list[_Head]] = {}
        self._lanes: dict[str, list[tuple[Share, Lane]]] = {}
        read = {(share.org_id, lane.lane_id) for share in shares for lane in share.lanes}
        wanted = {room.name for one in wants for room in one.rooms}
        self._slots: dict[str, dict[str, int]] = {}
        # By room: lanes as they are just now, and where no more is left beside what stands before some tries.
        self._heads: dict[str, list[_Head]] = {}
        self._crowded: set[_Like] = set()
        for one in elders:
            slots = self._slots.setdefault(one.room, {})
            slots[one.queue] = max(slots.get(one.queue, 0), one.slots)
            if (one.org_id, one.lane_id) not in read:
                at = one.org_id, one.queue, one.offset_us, one.virtual_s
                head = one.queue, at, one.ranks, one.cost, one.use_s
                self._elders.setdefault(one.room, []).append(head)
        for share in shares:
            for lane in share.lanes:
                for room in lane.rooms:
                    if room.name in wanted:
                        self._lanes.setdefault(room.name, []).append((share, lane))
        self._guarded = self._waiting[:_MOST]
        for want in wants:
            for crossing in want.crossings:
                crossing.riders += 1

    def begin(self) -> None:
        """Let those begin for which all places are kept; from now on nothing passes those that wait."""
        self._look()
        for want in self._waiting:
            if want.place is not None and all(one.kept_for == want.place for one in want.rooms):
                self._let_on(want)
        for want in self._guarded:
            for room in want.rooms:
                room.line = self

    def let_before(self, share: Share, lane: Lane) -> None:
        """Let those begin that the next item of a lane may not pass, since it is about to go."""
        self._look()
        rank, at = lane.ranks[lane.taken], _at(share, lane)
        rooms = {room.name for room in lane.rooms}
        before = [one for one in self._guarded if self._is_before(one, rank, at, rooms)]
        for want in _in_turn(before) if before else ():
            # Those of its org that went meanwhile may have brought it behind.
            if not want.crossings or self._is_before(want, rank, at, rooms):
                self._let_on(want)

    def finish(self) -> None:
        """Let the others begin with what is left, those that have just come last; the claim's slots are given out."""
        self._left = {}
        self._forget()
        for wants in (self._waiting, self._fresh):
            for want in _in_turn(wants):
                self._let_on(want)

    def _let_on(self, want: Want) -> None:
        """Let one begin that has a place in all its rooms, and in its bounds."""
        if want.is_beyond:
            return
        want.full = next((room for room in want.rooms if not self._has_place(room, want)), None)
        if want.full is not None:
            return
        if not take(want.bounds):
            want.is_beyond = True
            return
        want.has_gone = True
        self._forget()
        for room in want.rooms:
            cost = room.cost(want.need)
            room.left -= cost
            if want.is_here:
                room.went += cost
            else:
                room.spared += cost
            if room.kept_for == want.place:
                room.kept_for = None
        for crossing in want.crossings:
            charge = crossing.ride if want.is_here else crossing.spare
            charge(want.org_id, want.use_s)

    def _has_place(self, room: Room, want: Want) -> bool:
        cost = room.cost(want.need)
        if room.kept_for is not None and room.kept_for == want.place:
            return room.left >= cost
        spare = room.left - cost - (0 if room.kept_for is None else room.kept)
        return spare >= 0 and not self._is_preceded(want, room, spare)

    def _is_preceded(self, want: Want, room: Room, spare: int) -> bool:
        """Whether what stands before a try in a room needs what it would take: in this claim, or in others now.

        Then it does so for all tries like it that came later: these are not looked at until something has changed.
        """
        like: _Like = (room.name, want.need, None)
        if want.since_us is not None:
            like = (room.name, want.need, (want.org_id, want.queue, want.offset_us))
        if like not in self._crowded:
            if not (self._is_behind(want, room) or self._is_outdone(want, room, spare)):
                return False
            self._crowded.add(like)
        return True

    def _is_behind(self, want: Want, room: Room) -> bool:
        """Whether an item of the lanes of this claim stands before a try in a room, and could go next."""
        return any(
            self._left.get(queue, 0) > 0 and not self._is_before(want, ranks[0], at, (room.name,))
            for queue, at, ranks, *_ in self._able(room)
        )

    def _is_outdone(self, want: Want, room: Room, spare: int) -> bool:
        """Whether those take more than is to spare that stand before a try and that other claims could let go now."""
        slots = {
            queue: count + self._left.get(queue, 0)
            for queue, count in self._slots.get(room.name, {}).items()
        }
        used_s: defaultdict[int, float] = defaultdict(float)
        for queue, at, ranks, cost, use_s in (
            *self._elders.get(room.name, ()),
            *self._able(room),
        ):
            for rank in ranks:
                # What stands behind the first that the try stands before does so too: no more is looked at.
                if slots.get(queue, 0) < 1 or self._is_before(
                    want, rank, at, (room.name,), used_s[at[0]]
                ):
                    break
                slots[queue] -= 1
                spare -= cost
                used_s[at[0]] += use_s
                if spare < 0:
                    return True
        return False

    def _able(self, room: Room) -> list[_Head]:
        """Return the lanes of this claim under a room whose next item has place in all its rooms."""
        found = self._heads.get(room.name)
        if found is None:
            found = self._heads[room.name] = [
                (
                    share.queue,
                    _at(share, lane),
                    lane.ranks[lane.taken :],
                    lane.cost(room),
                    lane.use_s(room) / share.weight,
                )
                for share, lane in self._lanes.get(room.name, ())
                if _can_go(share, lane)
            ]
        return found

    def _forget(self) -> None:
        """Look at lanes anew: places were taken."""
        self._heads.clear()
        self._crowded.clear()

    def _look(self) -> None:
        """See how many slots of its own the claim has left by queue, and look at lanes anew."""
        self._forget()
        taken: Counter[str] = Counter()
        for (queue, _), share in self._shares.items():
            taken[queue] += sum(lane.taken for lane in share.lanes)
        self._left = {queue: slots - taken[queue] for queue, slots in self._free.items()}

    def _is_before(
        self, want: Want, rank: int, at: _At, rooms: Container[str], more_s: float = 0.0
    ) -> bool:
        """Whether a try stands in line before an item of a lane that needs these rooms.

        So much `more_s` will its org have used by then.
        """
        if want.since_us is None or want.has_gone or want.is_beyond:
            return False
        org_id, queue, offset_us, virtual_s = at
        if org_id == want.org_id:
            return want.since_us + want.offset_us < rank + offset_us
        if want.crossings and (met := [one for one in want.crossings if one.room.name in rooms]):
            # By the one of which it has used more, where there are several, as lanes that wait for each other.
            mine_s = max(one.at_s(want.org_id) for one in met)
            theirs_s = max(one.at_s(org_id) for one in met) + more_s
            return mine_s < theirs_s if mine_s != theirs_s else want.since_us < rank
        if queue == want.queue:
            mine_s = self._reached(queue, want.org_id, want.virtual_s)
            if mine_s > self._reached(queue, org_id, virtual_s):
                return False
        return want.since_us < rank

    def _reached(self, queue: str, org_id: int, virtual_s: float) -> float:
        """Return where an org stands in a queue by now."""
        share = self._shares.get((queue, org_id))
        return virtual_s if share is None else share.virtual_s


def give_back(want: Want) -> None:
    """Take back what a try of this claim was given that cannot begin after all."""
    for room in want.rooms:
        room.left += room.cost(want.need)
        room.went -= room.cost(want.need)
    for crossing in want.crossings:
        crossing.give_back(want.org_id, want.use_s)


def _in_turn(wants: Iterable[Want]) -> Iterator[Want]:
    """Yield those that have not gone, in their order; but a place of those that need the same crossings goes in turn.

    The next one is then of the org that stands lowest there, as of the one before it has been decided.
    """
    left = [one for one in wants if not one.has_gone]
    lines: defaultdict[tuple[int, ...], dict[int, deque[Want]]] = defaultdict(dict)
    for want in left:
        if want.crossings:
            orgs = lines[tuple(id(one) for one in want.crossings)]
            orgs.setdefault(want.org_id, deque()).append(want)
    heaps = {
        needs: [(*_stands(of[0]), org_id) for org_id, of in orgs.items()]
        for needs, orgs in lines.items()
    }
    for heap in heaps.values():
        heapq.heapify(heap)
    for want in left:
        if not want.crossings:
            yield want
            continue
        needs = tuple(id(one) for one in want.crossings)
        heap, orgs = heaps[needs], lines[needs]
        while (now := _stands(orgs[heap[0][2]][0])) != heap[0][:2]:
            heapq.heapreplace(heap, (*now, heap[0][2]))
        org_id = heap[0][2]
        yield orgs[org_id].popleft()
        if not orgs[org_id]:
            heapq.heappop(heap)


def _stands(want: Want) -> tuple[float, int]:
    """Return where the org of a try stands in its crossings by now, by the one of which it has used more, and since."""
    return max(one.at_s(want.org_id) for one in want.crossings), want.since_us or 0


def _at(share: Share, lane: Lane) -> _At:
    return share.org_id, share.queue, lane.offset_us, share.virtual_s


def _can_go(share: Share, lane: Lane) -> bool:
    """Whether the next item of a lane has place in all its rooms."""
    place = (share.org_id, lane.lane_id)
    return lane.can_go and all(one.has_for(place, lane.cost(one)) for one in lane.rooms)
