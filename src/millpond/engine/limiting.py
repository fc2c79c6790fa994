"""Limiting: what a claim reads and writes of limits, so that the admission can keep them all at once.

Called by `claim` within its transaction, after its lock, and only where limits are set. Invariants: what is in use is
counted from leases at every claim; a rate's meter is on disk before what it let through begins; a lane that may not go
leaves the active order under one full room, and only a claim that sees room there puts it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.admission import Lane, Room, Share, Waiting, keep_rooms
from millpond.engine.lanes import ALONE
from millpond.engine.rules import (
    NO_CEILING,
    Place,
    RoomId,
    Rule,
    Rules,
    allowed,
    next_at_us,
    spent,
)

_SQL = queries("limiting")
# So long a head that needs several rooms is passed over before one of each is kept for it.
PATIENCE_S = 5.0
_MAX_WOKEN = 256
_MAX_KNOWN = 50_000
# When a room is looked at again that has place, where this worker cannot now do what is parked there.
_LATER_US = 100_000
_AT_ONCE, _NEVER = 0, -1


@dataclass(kw_only=True, slots=True)
class _State:
    """A room in this claim."""

    rule: Rule
    room: Room
    in_use: int
    tat_us: int | None = None

    def plan_us(self, now_us: int) -> int:
        """Return when to look at lanes that are parked here now, after what goes in this claim."""
        if self.rule.maximum < 1:
            return _NEVER
        if self.rule.kind != "rate" or self.room.left > 0:
            return _AT_ONCE
        return next_at_us(self.rule, spent(self.rule, self.tat_us, now_us, self.room.went))


@dataclass(slots=True)
class _Seen:
    """What one claim has read."""

    now_us: int = 0
    in_use: Counter[RoomId] = field(default_factory=Counter)
    tats: dict[str, int | None] = field(default_factory=dict)
    states: dict[RoomId, _State] = field(default_factory=dict)


class Limiter:
    """The limits as one claimer knows them, and where this claim stands."""

    def __init__(self, capabilities: Sequence[str]) -> None:
        # Whoever executes work alone is started for lanes that are active, so that others wake these.
        self._able = [*capabilities, *(f"{able}{ALONE}" for able in capabilities)]
        self._version = 0
        self._rules = Rules()
        self._places: dict[tuple[int, int], tuple[Place, ...]] = {}
        self._seen = _Seen()
        self._is_parked = False
        self._next_us = 0
        self._crowded: set[str] = set()
        self.has_more = False

    @property
    def is_on(self) -> bool:
        """Whether a claim has to look at limits at all."""
        return bool(self._rules) or self._is_parked

    @property
    def has_parked(self) -> bool:
        """Whether lanes are parked in the queues of the last claim."""
        return self._is_parked

    def poll_s(self, poll_s: float, parked_s: float) -> float:
        """Return after how long to claim again: `poll_s`, but sooner while lanes are parked or a room is due."""
        if self._is_parked:
            poll_s = min(poll_s, parked_s)
        if self._next_us:
            poll_s = min(poll_s, max(0.0, (self._next_us - self._seen.now_us) / 1e6))
        return poll_s

    def is_current(self, version: str) -> bool:
        """Whether these are the limits that the database has."""
        return version == "0" or int(version) == self._version

    async def open(self, con: Connection, names: Sequence[str]) -> None:
        """Count what is in use and wake what may find room, before the claim reads heads of these queues."""
        self._seen = seen = _Seen()
        self._crowded.clear()
        self.has_more = False
        now, *rows = await con.fetch(_SQL["rooms"], list(names), self._able, PATIENCE_S)
        seen.now_us, self._next_us = now["us"], now["org_id"]
        self._is_parked = bool(now["lane_id"])
        if now["n"] != self._version:
            await self._learn(con, now["n"])
        for row in rows:
            if row["kind"] == "held":
                for room, rule in self._of(row):
                    if rule.kind == "concurrency":
                        seen.in_use[room] += row["n"]
        rooms = [row for row in rows if row["kind"] == "room"]
        seen.tats = {row["room"]: row["us"] for row in rooms}
        waiting = [row for row in rows if row["kind"] == "waiting"]
        chosen = await self._keep(con, waiting)
        await self._wake(con, rooms, chosen, list(names))

    async def read(self, con: Connection, rows: Sequence[Record]) -> None:
        """Read the meters of rates that hold for these lanes."""
        await self._meter(con, [place for row in rows for place in self._of(row)])

    def rooms(self, row: Record) -> list[Room]:
        """Return the rooms in which every item of a lane takes a place."""
        return [self._state(place.room, place.rule).room for place in self._of(row)]

    async def close(self, con: Connection, shares: Sequence[Share]) -> None:
        """Store what was spent and where the lanes that were looked at stand."""
        seen = self._seen
        rates = [
            (room.text, spent(one.rule, one.tat_us, seen.now_us, one.room.went))
            for room, one in seen.states.items()
            if one.rule.kind == "rate" and one.room.went > 0
        ]
        if rates:
            await con.execute(_SQL["spend"], [room for room, _ in rates], [at for _, at in rates])
        plans = {
            one.room.name: one.plan_us(seen.now_us)
            for one in seen.states.values()
            if one.room.name in self._crowded
        }
        if plans:
            await self._plan(con, plans, ())
        lanes = [
            (share, lane)
            for share in shares
            for lane in share.lanes
            if lane.taken or lane.full is not None or (lane.is_spent and lane.is_whole)
        ]
        if lanes:
            await self._park(con, lanes)

    async def _park(self, con: Connection, lanes: Sequence[tuple[Share, Lane]]) -> None:
        full = {lane.full.name for _, lane in lanes if lane.full is not None}
        under = [one for room, one in self._seen.states.items() if room.text in full]
        due = [one.plan_us(self._seen.now_us) for one in under]
        await con.execute(
            _SQL["park"],
            [share.org_id for share, _ in lanes],
            [lane.lane_id for _, lane in lanes],
            [None if lane.full is None else lane.full.name for _, lane in lanes],
            [share.virtual_s for share, _ in lanes],
            [len(lane.rooms) for _, lane in lanes],
            [lane.taken > 0 for _, lane in lanes],
            [one.room.name for one in under],
            due,
            [one.in_use + one.room.went for one in under],
            [one.rule.maximum for one in under],
        )
        if full:
            self._is_parked = True
            times = [at for at in [*due, self._next_us] if at > 0]
            self._next_us = min(times, default=0)

    async def _learn(self, con: Connection, version: int) -> None:
        rows = await con.fetch(_SQL["rules"])
        self._rules = Rules.of(Rule(**dict(row)) for row in rows)
        self._places.clear()
        self._version = version

    def _of(self, row: Record) -> tuple[Place, ...]:
        """Return the rooms of a lane; what a lane is never changes, so that they are found once."""
        lane = (row["org_id"], row["lane_id"])
        places = self._places.get(lane)
        if places is None:
            if len(self._places) >= _MAX_KNOWN:
                self._places.clear()
            able = row["capability"].rstrip(ALONE)
            places = self._rules.places(row["org_id"], row["queue"], able, row["keys"])
            self._places[lane] = places
        return places

    def _state(self, room_id: RoomId, rule: Rule) -> _State:
        state = self._seen.states.get(room_id)
        if state is None:
            text = room_id.text
            tat_us, in_use = self._seen.tats.get(text), self._seen.in_use[room_id]
            left = rule.maximum - in_use
            if rule.kind == "rate":
                left = allowed(rule, tat_us, self._seen.now_us)
            room = Room(left=left, name=text)
            state = _State(rule=rule, room=room, in_use=in_use, tat_us=tat_us)
            self._seen.states[room_id] = state
        return state

    async def _meter(self, con: Connection, places: Sequence[Place]) -> None:
        texts = {place.room.text for place in places if place.rule.kind == "rate"}
        if texts := texts - self._seen.tats.keys():
            self._seen.tats |= dict.fromkeys(texts)
            rows = await con.fetch(_SQL["meters"], list(texts))
            self._seen.tats |= {row["room"]: row["tat_us"] for row in rows}

    async def _keep(self, con: Connection, rows: Sequence[Record]) -> list[tuple[int, int]]:
        """Keep room for heads that waited long; returns the lanes of those that can go here and now."""
        await self._meter(con, [place for row in rows for place in self._of(row)])
        waiting: list[Waiting] = []
        chosen: list[tuple[int, int]] = []
        for row in rows:
            places = self._of(row)
            if any(place.rule.maximum < 1 for place in places):
                continue
            rooms = self.rooms(row)
            one = Waiting(
                org_id=row["org_id"], lane_id=row["lane_id"], since_us=row["us"], rooms=rooms
            )
            waiting.append(one)
            if row["n"] and all(room.left > 0 for room in rooms):
                chosen.append((one.org_id, one.lane_id))
        keep_rooms(waiting)
        kept = {room.room.kept_for for room in self._seen.states.values()}
        return [lane for lane in chosen if lane in kept]

    async def _wake(
        self,
        con: Connection,
        rows: Sequence[Record],
        chosen: Sequence[tuple[int, int]],
        names: Sequence[str],
    ) -> None:
        """Put as many lanes back into the active order as their rooms have place for."""
        most: dict[str, int] = {}
        states: dict[str, _State | None] = {}
        plans: dict[str, int] = {}
        for row in rows:
            room_id = RoomId.parse(row["room"])
            rule = self._rules.rule_of(room_id)
            state = None if rule is None else self._state(room_id, rule)
            room = None if state is None else state.room
            left = NO_CEILING if room is None else room.left - (room.kept_for is not None)
            states[row["room"]] = state
            if left > row["n"]:
                most[row["room"]] = min(left - row["n"], _MAX_WOKEN)
            elif state is not None and room is not None and room.left < 1:
                plans[row["room"]] = state.plan_us(self._seen.now_us)
        gone: list[str] = []
        if most or chosen:
            woken = await con.fetch(
                _SQL["wake"],
                list(most),
                list(most.values()),
                list(names),
                self._able,
                [org_id for org_id, _ in chosen],
                [lane_id for _, lane_id in chosen],
            )
            for row in woken:
                name, state = row["room"], states[row["room"]]
                if not row["has_more"]:
                    gone.append(name)
                elif row["woken"] < most[name]:
                    plans[name] = self._seen.now_us + _LATER_US
                elif state is None:
                    self.has_more = True
                elif state.rule.kind == "rate":
                    self._crowded.add(name)
        if gone or plans:
            await self._plan(con, plans, gone)

    async def _plan(self, con: Connection, plans: dict[str, int], gone: Sequence[str]) -> None:
        """Set when rooms are looked at again; those of `gone` have no lanes parked under them any more."""
        later = {name: at for name, at in plans.items() if at != _AT_ONCE}
        if later or gone:
            await con.execute(_SQL["plan"], list(later), list(later.values()), list(gone))
        self._next_us = min([at for at in [*later.values(), self._next_us] if at > 0], default=0)
