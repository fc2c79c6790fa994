"""Standing: which lanes of a simulation stand under full rooms, how full these are, and which lanes wake. Pure.

Called by `simulating`, in place of the tables that the product's claim reads and writes for limits. Invariant: what is
decided is decided by `counting`; a lane stands under one room at most, and counts there until work of it goes.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from millpond.engine.accounts import Crossing, stands_s
from millpond.engine.admission import Lane, Room, Share
from millpond.engine.counting import (
    MAX_WAITERS,
    NEVER,
    PATIENCE_S,
    Counts,
    keep,
    most_awake,
    weighed,
)
from millpond.engine.keeping import Waiting
from millpond.engine.rules import Place, RoomId, Rules
from millpond.engine.settled import Settled
from millpond.engine.tokens import Need, Needs, Used
from millpond.types import NO_ORG

_MAX_WAITING = 64
_PATIENCE_US = round(PATIENCE_S * 1e6)
# Where lanes stand: under a room, and of tokens with what they need.
_Stand = tuple[RoomId, Need | None]


@dataclass(eq=False, kw_only=True, slots=True)
class Line:
    """A lane with the runs that wait in it; `stamp` tells a sleep from earlier ones.

    `need` is what each of them takes of limits on tokens, None where it is under none.
    """

    lane_id: int
    org_id: int
    queue: str
    capability: str
    offset_us: int
    places: tuple[Place, ...]
    keys: tuple[str, ...] = ()
    waiting: deque[int] = field(default_factory=deque)
    is_active: bool = False
    parked_on: _Stand | None = None
    stamp: int = 0
    blocked_us: int = 0
    need: Need | None = None

    @property
    def cost(self) -> int:
        """How many tokens each run takes where these are limited."""
        return 1 if self.need is None else self.need.tokens

    @property
    def sleeps(self) -> bool:
        """Whether it stands under a room and has not been woken."""
        return self.parked_on is not None and not self.is_active


@dataclass(eq=False, slots=True)
class _Parked:
    """The lanes under one room, by queue: those that sleep, in fair order, and how many woke and have not gone.

    `orgs` is how many of each org are there, asleep or awake.
    """

    sleeping: dict[str, list[tuple[float, int, int, int]]] = field(default_factory=dict)
    count: int = 0
    awake: Counter[str] = field(default_factory=Counter)
    orgs: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False, slots=True)
class _Crossed:
    """A room that lanes of several queues need: its clock, and where orgs stand there over all queues."""

    clock_s: float
    at_s: dict[int, float] = field(default_factory=dict)


class Standing:
    """Rooms on a virtual clock. `full_s` is for how long each was full, `most_in_use` how much it had at most.

    `clocks` are those of the queues' fair orders.
    """

    def __init__(self, rules: Rules, clocks: Mapping[str, float] | None = None) -> None:
        self._rules = rules
        self._clocks = {} if clocks is None else clocks
        self._crossed: dict[RoomId, _Crossed] = {}
        self._crossings: dict[RoomId, Crossing] = {}
        self._has_rates = False
        self._lines: dict[int, Line] = {}
        self._in_use: Counter[RoomId] = Counter()
        self._tats: dict[str, int | None] = {}
        self._full_at: dict[RoomId, float] = {}
        self._parked: dict[_Stand, _Parked] = {}
        self._blocked: dict[int, Line] = {}
        self._overdue: list[Line] = []
        self._waiters: dict[int, int] = {}
        self._seen = Counts()
        self._needs = Needs()
        self._settled = Settled()
        self.full_s: dict[RoomId, float] = {}
        self.most_in_use: dict[RoomId, int] = {}

    @property
    def has_parked(self) -> bool:
        """Whether a lane stands under some room."""
        return bool(self._parked)

    def begin(
        self,
        now_us: int,
        slots: Mapping[str, int],
        cost_s: Callable[[Line], float],
        needs: Needs,
    ) -> Iterator[Line]:
        """Begin a claim; yields lanes that wake, each to be put into the active order before the next is asked for.

        First heads that waited long, then from each room as many as it has place for. `slots` is how many of each
        queue can go at most, `cost_s` what a run of a lane is expected to take, over its org's weight; `needs` are
        what the worker that claims has learned of tokens.
        """
        self._needs = needs
        settled = self._settled.take(needs)
        self._seen = Counts(
            now_us=now_us, tats=self._tats, deltas=self._settled.deltas, _in_use=self._in_use
        )
        for place in settled:
            self._seen.state(*place)
        self._overdue.clear()
        self._crossings.clear()
        if not self._parked:
            return
        served = list(slots)
        for line in self._keep(set(served)):
            if not line.is_active:
                yield self._rouse(line)
        for (room_id, need), parked in list(self._parked.items()):
            if parked.count:
                rule = self._rules.rule_of(room_id)
                state = None if rule is None else self._seen.state(room_id, rule)
                if (crossed := self._crossed.get(room_id)) is not None:
                    yield from self._in_turn(parked, crossed, most_awake(state), slots, cost_s)
                    continue
                awake = sum(parked.awake[queue] for queue in served)
                for _ in range(most_awake(state, need) - awake):
                    first = self._first(parked, served)
                    if first is None:
                        break
                    yield self._rouse(first)

    def rooms(self, line: Line) -> list[Room]:
        """Return the rooms of a lane as this claim finds them; its need is then what is known by now."""
        if line.need is not None and not line.need.is_declared:
            line.need = weighed(self._needs.need(line.capability, line.keys), line.places)
        self._has_rates = self._has_rates or any(one.rule.is_metered for one in line.places)
        for room_id, rule in line.places:
            crossed = self._crossed.get(room_id)
            if crossed is not None and room_id not in self._crossings:
                self._crossings[room_id] = Crossing(
                    room=self._seen.state(room_id, rule).room,
                    since_s=crossed.clock_s,
                    virtual_s=crossed.at_s,
                    waiting=self._waiting(room_id),
                )
        return self._seen.rooms((line.org_id, line.lane_id), line.capability, line.places)

    def settle(self, line: Line, head: Lane, virtual_s: float) -> None:
        """Keep where a claim leaves a lane: parked under a room, or under none."""
        if not head.taken and head.full is None and not head.is_spent:
            return
        if head.taken or head.full is None:
            self._forget(line)
        if line.parked_on is not None:
            parked = self._parked[line.parked_on]
            parked.awake[line.queue] -= 1
            parked.orgs[line.org_id] -= 1
            if not parked.count and not any(parked.awake.values()):
                del self._parked[line.parked_on]
            line.parked_on = None
        if head.full is not None:
            self._park(line, head, virtual_s)

    def _waiting(self, room_id: RoomId) -> set[int]:
        parked = self._parked.get((room_id, None))
        return set() if parked is None else {org for org, count in parked.orgs.items() if count > 0}

    @property
    def crossings(self) -> Sequence[Crossing]:
        """The rooms that lanes of several queues need, of those that this claim looked at."""
        return list(self._crossings.values())

    def spend(self, shares: Sequence[Share]) -> None:
        """Keep what orgs used of crossings by what went in this claim."""
        for room_id, one in self._crossings.items():
            crossed = self._crossed[room_id]
            crossed.at_s |= one.reached(shares)
            crossed.clock_s = max(crossed.clock_s, one.clock_s)

    def charge(self, org_id: int, room: str, virtual_s: float) -> None:
        """Move where an org stands in a crossing by what it used beyond what its claims were charged, or less."""
        crossed = self._crossed[RoomId.parse(room)]
        crossed.at_s[org_id] = crossed.at_s.get(org_id, crossed.clock_s) + virtual_s
        if virtual_s < 0:
            crossed.clock_s = min(crossed.clock_s, max(crossed.at_s.values()))

    def crossed(self, line: Line) -> tuple[str, ...]:
        """Return the crossings that work of a lane goes through."""
        if not self._crossings:
            return ()
        return tuple(room.text for room, _ in line.places if room in self._crossings)

    def end(self) -> int | None:
        """End a claim: store what rates were used; returns when one of them lets the next through, if lanes wait."""
        if not self._has_rates:
            return None
        seen = self._seen
        states = seen.states()
        stands = {stand for stand, parked in self._parked.items() if parked.count}
        # A head that waited long may stand under a room that is kept for it until a rate lets it go.
        stands |= {(place.room, line.need) for line in self._overdue for place in line.places}
        due_us = [
            state.plan_us(seen.now_us, need)
            for room_id, need in stands
            if (state := states.get(room_id.text)) is not None and state.rule.is_metered
        ]
        self._tats |= {name: tat_us for name, tat_us, _ in seen.meters()}
        return min((at for at in due_us if seen.now_us < at < NEVER), default=None)

    def take(self, line: Line, now_s: float) -> None:
        """Count a run of a lane in."""
        for room_id, rule in line.places:
            if rule.kind == "concurrency":
                in_use = self._in_use[room_id] = self._in_use[room_id] + 1
                if in_use > self.most_in_use.get(room_id, 0):
                    self.most_in_use[room_id] = in_use
                if in_use == rule.maximum:
                    self._full_at[room_id] = now_s

    def leave(self, line: Line, now_s: float, had: int, used: Sequence[Used] | None) -> None:
        """Count a run of a lane out that had reserved so many tokens, and used these."""
        if line.need is not None:
            self._settled.end(line.capability, line.keys, line.places, had, used)
        for room_id, rule in line.places:
            if rule.kind == "concurrency":
                if self._in_use[room_id] == rule.maximum:
                    self._add_full(room_id, now_s)
                self._in_use[room_id] -= 1

    def _add_full(self, room_id: RoomId, now_s: float) -> None:
        since_s = self._full_at.pop(room_id)
        self.full_s[room_id] = self.full_s.get(room_id, 0.0) + now_s - since_s

    def _park(self, line: Line, head: Lane, virtual_s: float) -> None:
        rooms = zip(line.places, head.rooms, strict=True)
        room_id = next(place.room for place, room in rooms if room is head.full)
        is_weighed = head.full is not None and head.full.is_weighed
        line.parked_on = (room_id, line.need if is_weighed else None)
        self._lines[line.lane_id] = line
        parked = self._parked.setdefault(line.parked_on, _Parked())
        parked.count += 1
        parked.orgs[line.org_id] += 1
        crossed = None if is_weighed else self._cross(room_id, parked, line.queue)
        if crossed is not None:
            virtual_s = crossed.at_s.setdefault(line.org_id, crossed.clock_s)
        row = (virtual_s, line.org_id, line.lane_id, line.stamp)
        heapq.heappush(parked.sleeping.setdefault(line.queue, []), row)
        waiters = self._waiters.get(line.org_id, 0)
        can_wait = self._seen.can_wait((line.org_id, line.lane_id), line.cost)
        if can_wait and line.lane_id not in self._blocked and waiters < MAX_WAITERS:
            self._waiters[line.org_id] = waiters + 1
            line.blocked_us = self._seen.now_us
            self._blocked[line.lane_id] = line

    def _cross(self, room_id: RoomId, parked: _Parked, queue: str) -> _Crossed | None:
        """Return what is kept of a room that lanes of several queues need; from the second queue on it is one."""
        crossed = self._crossed.get(room_id)
        others = any(heap for other, heap in parked.sleeping.items() if other != queue)
        if crossed is None and others and room_id.org_id == NO_ORG:
            clock_s = max(self._clocks.values(), default=0.0)
            crossed = self._crossed[room_id] = _Crossed(clock_s)
            for heap in parked.sleeping.values():
                heap[:] = [(clock_s, org, lane, stamp) for _, org, lane, stamp in heap]
                heapq.heapify(heap)
        return crossed

    def _in_turn(
        self,
        parked: _Parked,
        crossed: _Crossed,
        most: int,
        slots: Mapping[str, int],
        cost_s: Callable[[Line], float],
    ) -> Iterator[Line]:
        """Yield the lanes to wake under a room that several queues need: those of the orgs that used it least."""
        woken = Counter({queue: min(parked.awake[queue], slots[queue]) for queue in slots})
        left = most - sum(woken.values())
        ahead: defaultdict[int, float] = defaultdict(float)

        def at_s(org_id: int) -> float:
            stands = stands_s(crossed.clock_s, crossed.at_s.get(org_id), is_waiting=True)
            return stands + ahead[org_id]

        while left > 0:
            open_queues = [queue for queue in slots if woken[queue] < slots[queue]]
            line = self._first(parked, open_queues, at_s)
            if line is None:
                return
            woken[line.queue] += 1
            left -= 1
            ahead[line.org_id] += cost_s(line)
            yield self._rouse(line)

    def _forget(self, line: Line) -> None:
        """Forget since when a lane has been passed over."""
        if self._blocked.pop(line.lane_id, None):
            self._waiters[line.org_id] -= 1

    def _keep(self, queues: set[str]) -> list[Line]:
        """Keep room for heads that have been passed over too long; returns those that can go now."""
        waiting: list[tuple[Waiting, bool]] = []
        for line in islice(self._blocked.values(), _MAX_WAITING):
            if line.blocked_us > self._seen.now_us - _PATIENCE_US:
                break
            one = Waiting(
                org_id=line.org_id,
                lane_id=line.lane_id,
                since_us=line.blocked_us,
                rooms=self.rooms(line),
                need=line.cost,
            )
            self._overdue.append(line)
            waiting.append((one, line.queue in queues))
        return [self._lines[lane_id] for _, lane_id in keep(waiting)]

    def _rouse(self, line: Line) -> Line:
        assert line.parked_on is not None
        parked = self._parked[line.parked_on]
        parked.count -= 1
        parked.awake[line.queue] += 1
        line.stamp += 1
        return line

    def _first(
        self,
        parked: _Parked,
        queues: Iterable[str],
        at_s: Callable[[int], float] | None = None,
    ) -> Line | None:
        """Take the lane that comes first in fair order among those that sleep in these queues.

        With `at_s` in the order of where their orgs stand by now.
        """
        best: list[tuple[float, int, int, int]] | None = None
        for queue in queues:
            heap = parked.sleeping.get(queue)
            while heap:
                virtual_s, org_id, lane_id, stamp = heap[0]
                if self._lines[lane_id].stamp != stamp:
                    heapq.heappop(heap)
                elif at_s is not None and at_s(org_id) != virtual_s:
                    heapq.heapreplace(heap, (at_s(org_id), org_id, lane_id, stamp))
                else:
                    break
            if heap and (best is None or heap[0] < best[0]):
                best = heap
        return None if best is None else self._lines[heapq.heappop(best)[2]]
