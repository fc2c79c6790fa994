"""Limiting: what a claim reads and writes of limits, so that the admission can keep them all at once.

Called by `claim`, within its transaction and after its lock. Invariants: what is in use is counted from leases at
every claim; a rate's meter is on disk before what it let through begins; a lane that may not go leaves the active order
under one full room, whose row stands until no lane has its name; only what holds for every worker is written there.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.admission import Lane, Room, Share, Waiting
from millpond.engine.counting import (
    AT_ONCE,
    MAX_WAITERS,
    NEVER,
    PATIENCE_S,
    Counts,
    State,
    keep,
    most_awake,
)
from millpond.engine.lanes import ALONE
from millpond.engine.rulebook import MOST_NEWS, RuleBook
from millpond.engine.rules import Place, RoomId, Rules

_SQL = queries("limiting")
# Of one claim: how many rooms of each queue it looks at, and of how many, and how many lanes of each, it wakes.
_PAGE = 500
_MAX_ROOMS = 64
_MAX_WOKEN = 256
# A worker that could not look at all rooms of a queue in one claim claims again so soon.
_NEXT_PAGE_S = 0.02
_FIRST = (-1, "", "")


class _Stand(NamedTuple):
    """A row of `room`: lanes of a queue and capability stand under it."""

    room: str
    queue: str
    capability: str
    due_us: int
    is_able: bool
    is_old: bool


_Key = tuple[str, str, str]


class Limiter:
    """The limits as one claimer knows them, and where this claim stands.

    `has_more`: another claim at once may let more go. `awaited`: capabilities of work whose end may give
    place to lanes that are parked in the queues of the last claim.
    """

    def __init__(self, capabilities: Sequence[str]) -> None:
        # Whoever executes work alone is started for lanes that are active, so that others wake these.
        self._able = [*capabilities, *(f"{able}{ALONE}" for able in capabilities)]
        self._book = RuleBook()
        self._seen = Counts()
        self._crowded: list[_Key] = []
        self._is_whole = True
        self._after: dict[str, tuple[int, str, str]] = {}
        self._next_us = 0
        self._has_rooms = False
        self._is_behind = False
        self._is_open = False
        self.has_more = False
        self.awaited: frozenset[str] = frozenset()
        self.began = 0.0
        self._asked: dict[str, tuple[int, int]] = {}

    @property
    def is_on(self) -> bool:
        """Whether a claim has to look at limits: there are some, or lanes that stand under one still."""
        return bool(self._book.rules) or self._has_rooms

    @property
    def open_steps(self) -> frozenset[str]:
        """The names of steps whose failures opened a breaker, as of the last claim."""
        return frozenset(one.step for one in self._book.rules.brakes() if one.opened_us)

    @property
    def rules(self) -> Rules:
        """The limits as they are known."""
        return self._book.rules

    @property
    def version(self) -> int:
        """How often limits had been changed as they were read."""
        return self._book.version

    @property
    def now_us(self) -> int:
        """The database's time of this claim, 0 where it looks at no limits."""
        return self._seen.now_us

    @property
    def has_rooms(self) -> bool:
        """Whether lanes stand under rooms."""
        return self._has_rooms

    def room(self, place: Place) -> Room:
        """Return a room as this claim has left it; its meter has been read."""
        return self._seen.state(*place).room

    def place_of(self, item_id: uuid.UUID, step_key: str) -> tuple[int, int] | None:
        """Return as whose room is kept for a step under a lease; None where none is to be."""
        return self._asked.get(f"{item_id} {step_key}")

    def put_off(self, room: Room) -> None:
        """Note that a step waits for a room that is full: for the end of other work, or for a time."""
        state = self._seen.states()[room.name]
        if state.is_counted:
            self._seen.awaited.add(room.name)
            self.awaited = self._seen.holders()
        self._sooner([state.plan_us(self._seen.now_us)])

    def poll_s(self, poll_s: float, parked_s: float) -> float:
        """Return after how long to claim again: sooner while lanes wait for work to end, or for a time."""
        if self._seen.awaited:
            poll_s = min(poll_s, parked_s)
        if not self._is_whole:
            poll_s = min(poll_s, _NEXT_PAGE_S)
        if self._next_us:
            poll_s = min(poll_s, max(0.0, (self._next_us - self._seen.now_us) / 1e6))
        return poll_s

    async def begin(self, database: EngineDatabase) -> None:
        """Make ready for a claim; reads outside of it what has changed by more than it may read itself."""
        self._seen = Counts()
        self._crowded = []
        self._is_whole = True
        self._next_us = 0
        self._is_open = self.has_more = False
        self.awaited = frozenset()
        self.began = 0.0
        self._asked = {}
        if self._is_behind:
            await self._book.learn(database)
            self._is_behind = False

    async def open(self, con: Connection, names: Sequence[str]) -> bool:
        """Count what is in use and wake what may find room, before the claim reads heads of these queues.

        False when more has changed than is to be read here: this claim claims nothing, the next one begins with it.
        """
        after = [self._after.get(name, _FIRST) for name in names]
        began = time.monotonic()
        now, *rows = await con.fetch(
            _SQL["rooms"],
            list(names),
            self._able,
            self._book.version,
            MOST_NEWS,
            _PAGE,
            *([one[nth] for one in after] for nth in range(3)),
            PATIENCE_S,
        )
        self._seen.now_us, self._next_us = now["us"], now["lane_id"]
        self.began = began + now["org_id"] / 1e6
        if not await self._book.catch_up(con, now["n"]):
            self._is_behind = True
            return False
        self._seen.rules = self._book.rules
        self._is_open = True
        for row in rows:
            if row["kind"] == "held":
                self._seen.add_held(row["capability"], self._book.places(row), row["n"])
            elif row["kind"] == "seated":
                self._seen.add_held(row["capability"], self._book.needed(row), row["n"])
        stands = self._turn(names, [row for row in rows if row["kind"] == "room"])
        asked = [row for row in rows if row["kind"] == "asked"]
        chosen = await self._keep(con, [row for row in rows if row["kind"] == "waiting"], asked)
        await self._wake(con, stands, chosen)
        await self.spend(con)
        self.awaited = self._seen.holders()
        return True

    def note(self, first: Record) -> bool:
        """Note what the first row of heads tells; False when this claim should have looked at limits."""
        self._has_rooms = first["weight"] > 0
        if self._is_open:
            return True
        self._is_behind = first["org_id"] != self._book.version
        return not (self._is_behind or self._has_rooms)

    async def read(self, con: Connection, rows: Sequence[Record]) -> None:
        """Read the meters of rates that hold for these lanes."""
        await self.meter(con, [place for row in rows for place in self._book.places(row)])

    def rooms(self, row: Record) -> list[Room]:
        """Return the rooms in which every item of a lane takes a place."""
        lane = (row["org_id"], row["lane_id"])
        return self._seen.rooms(lane, row["capability"], self._book.places(row))

    async def close(self, con: Connection, shares: Sequence[Share]) -> None:
        """Store what was spent and where the lanes that were looked at stand."""
        seen = self._seen
        await self.spend(con)
        states = seen.states()
        await self._plan(con, {key: states[key[0]].plan_us(seen.now_us) for key in self._crowded})
        lanes = [
            (share, lane)
            for share in shares
            for lane in share.lanes
            if lane.taken or lane.full is not None or (lane.is_spent and lane.is_whole)
        ]
        if lanes:
            await self._park(con, lanes)
        seen.add_taken(lanes)
        self.awaited = seen.holders()

    def paced(self, shares: Sequence[Share]) -> set[tuple[int, uuid.UUID]]:
        """Return what was taken that a rate let go, as org and item."""
        return self._seen.paced(shares)

    async def spend(self, con: Connection) -> None:
        """Store how far rates are used by now."""
        if meters := self._seen.meters():
            await con.execute(_SQL["spend"], [name for name, _ in meters], [at for _, at in meters])

    async def _park(self, con: Connection, lanes: Sequence[tuple[Share, Lane]]) -> None:
        full = {lane.full.name for _, lane in lanes if lane.full is not None}
        under = [one for name, one in self._seen.states().items() if name in full]
        due = [one.plan_us(self._seen.now_us) for one in under]
        await con.execute(
            _SQL["park"],
            [share.org_id for share, _ in lanes],
            [lane.lane_id for _, lane in lanes],
            [None if lane.full is None else lane.full.name for _, lane in lanes],
            [share.virtual_s for share, _ in lanes],
            [self._seen.can_wait((share.org_id, lane.lane_id)) for share, lane in lanes],
            [lane.taken > 0 for _, lane in lanes],
            [one.room.name for one in under],
            due,
            [one.in_use + one.room.went for one in under],
            [one.rule.maximum for one in under],
            self._book.version,
            MAX_WAITERS,
        )
        self._has_rooms = self._has_rooms or bool(full)
        self._seen.awaited |= {one.room.name for one in under if one.is_counted}
        self._sooner(due)

    def _turn(self, names: Sequence[str], rows: Sequence[Record]) -> list[_Stand]:
        """Return the rooms to look at, each once; the next claim goes on after them where there may be more."""
        stands: dict[_Key, _Stand] = {}
        counts = Counter([row["queue"] for row in rows if row["lane_id"] < 2])
        old = Counter([row["queue"] for row in rows if row["lane_id"] >= 2])
        last = {row["queue"]: row for row in rows if row["lane_id"] < 2}
        for row in rows:
            self._seen.tats[row["room"]] = row["us"]
            key = (row["room"], row["queue"], row["capability"])
            able, is_old = bool(row["lane_id"] & 1), row["lane_id"] >= 2
            stands[key] = _Stand(*key, due_us=row["n"], is_able=able, is_old=is_old)
        for name in names:
            if counts[name] < _PAGE:
                self._after.pop(name, None)
                continue
            row = last[name]
            self._after[name] = (row["n"], row["room"], row["capability"])
            self._is_whole = False
        self.has_more = self.has_more or any(count >= _PAGE for count in old.values())
        return list(stands.values())

    async def meter(self, con: Connection, places: Sequence[Place]) -> None:
        """Read the meters of rates in these rooms that were not read yet."""
        texts = {place.room.text for place in places if place.rule.kind == "rate"}
        if texts := texts - self._seen.tats.keys():
            self._seen.tats |= dict.fromkeys(texts)
            rows = await con.fetch(_SQL["meters"], list(texts))
            self._seen.tats |= {row["room"]: row["tat_us"] for row in rows}

    async def _keep(
        self, con: Connection, rows: Sequence[Record], asked: Sequence[Record]
    ) -> list[tuple[int, int]]:
        """Keep room for heads and steps that waited long; returns the lanes of heads that can go here and now."""
        await self.read(con, rows)
        waiting = await self._steps(con, asked)
        closed: list[tuple[int, int]] = []
        for row in rows:
            if self._seen.is_closed(self._book.places(row)):
                closed.append((row["org_id"], row["lane_id"]))
                continue
            one = Waiting(
                org_id=row["org_id"],
                lane_id=row["lane_id"],
                since_us=row["us"],
                rooms=self.rooms(row),
            )
            waiting.append((one, bool(row["n"])))
        if closed:
            await con.execute(
                _SQL["forget"], [org_id for org_id, _ in closed], [lane_id for _, lane_id in closed]
            )
        return keep(waiting)

    async def _steps(self, con: Connection, asked: Sequence[Record]) -> list[tuple[Waiting, bool]]:
        """Return the steps for which room is to be kept; the worker of each lets it go."""
        needs = [(row, self._book.needed(row)) for row in asked]
        await self.meter(con, [place for _, places in needs for place in places])
        found: list[tuple[Waiting, bool]] = []
        for nth, (row, places) in enumerate(needs, 1):
            self._asked[row["room"]] = (row["org_id"], -nth)
            if places and not self._seen.is_closed(places):
                rooms = [self.room(place) for place in places]
                one = Waiting(org_id=row["org_id"], lane_id=-nth, since_us=row["us"], rooms=rooms)
                found.append((one, False))
        return found

    async def _wake(
        self, con: Connection, stands: Sequence[_Stand], chosen: Sequence[tuple[int, int]]
    ) -> None:
        """Put as many lanes back into the active order as their rooms have place for."""
        plans: dict[_Key, int | None] = {}
        woken: list[tuple[_Stand, State | None, int]] = []
        for stand in stands:
            room_id = RoomId.parse(stand.room)
            rule = self._book.rules.rule_of(room_id)
            state = None if rule is None else self._seen.state(room_id, rule)
            if state is not None and state.is_boundless:
                state = None
            most, due_us = min(_MAX_WOKEN, most_awake(state)), AT_ONCE
            if state is not None:
                due_us = state.plan_us(self._seen.now_us)
                if stand.is_able and state.is_counted:
                    self._seen.awaited.add(stand.room)
            if stand.is_old or (due_us != stand.due_us and due_us > self._seen.now_us):
                plans[stand[:3]] = due_us
            if stand.is_able and most > 0:
                woken.append((stand, state, most))
        self.has_more = self.has_more or len(woken) > _MAX_ROOMS
        woken = woken[:_MAX_ROOMS]
        if woken or chosen:
            rows = await con.fetch(
                _SQL["wake"],
                *([stand[nth] for stand, _, _ in woken] for nth in range(3)),
                [most for _, _, most in woken],
                [state is None for _, state, _ in woken],
                [org_id for org_id, _ in chosen],
                [lane_id for _, lane_id in chosen],
            )
            rates = {one[:3] for one, state, _ in woken if state and state.rule.kind == "rate"}
            for row in rows:
                key = (row["room"], row["queue"], row["capability"])
                self.has_more = self.has_more or row["has_more"]
                if row["is_over"]:
                    plans[key] = None
                elif key in rates:
                    self._crowded.append(key)
        await self._plan(con, plans)

    async def _plan(self, con: Connection, plans: dict[_Key, int | None]) -> None:
        """Set when rooms are looked at again; None takes away one that no lane stands under."""
        if not plans:
            return
        await con.execute(
            _SQL["plan"],
            *([key[nth] for key in plans] for nth in range(3)),
            list(plans.values()),
            self._book.version,
        )
        self._sooner(at for at in plans.values() if at is not None)

    def _sooner(self, times: Iterable[int]) -> None:
        """Let the next claim be when the first of these is due."""
        due = [at for at in [*times, self._next_us] if AT_ONCE < at < NEVER]
        self._next_us = min(due, default=0)
