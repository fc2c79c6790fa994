"""Limiting: what a claim reads and writes of limits, so that the admission can keep them all at once.

Called by `claim`, within its transaction and after its lock. Invariants: what is in use is counted from leases at
every claim; a rate's meter is on disk before what it let through begins; a lane that may not go leaves the active order
under one full room, whose row stands until no lane has its name; only what holds for every worker is written there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.admission import Lane, Room, Share
from millpond.engine.brakes import Brake
from millpond.engine.counting import (
    MAX_WAITERS,
    PATIENCE_S,
    Counts,
    base_of,
    keep,
    stand_of,
)
from millpond.engine.crossings import Crossings
from millpond.engine.due_rooms import DueRooms
from millpond.engine.keeping import Waiting
from millpond.engine.lanes import ALONE
from millpond.engine.needs import APART
from millpond.engine.reservations import Reservations
from millpond.engine.rulebook import MOST_NEWS, RuleBook
from millpond.engine.rules import Place, RoomId, Rules
from millpond.engine.tokens import Need
from millpond.engine.waiters import Asked
from millpond.types import NO_ORG

_SQL = queries("limiting")


class Limiter:
    """The limits as one claimer knows them, and where this claim stands.

    `awaited`: capabilities of work whose end may give place to lanes that are parked in the queues of the last claim.
    """

    def __init__(
        self,
        capabilities: Sequence[str],
        estimate_s: Callable[[str], float],
        try_s: Callable[[str], float] | None = None,
    ) -> None:
        # Whoever executes work alone is started for lanes that are active, so that others wake these.
        self._able = [*capabilities, *(f"{able}{ALONE}" for able in capabilities)]
        self._book = RuleBook()
        self._rooms = DueRooms(self._able, self._book)
        self.reservations = Reservations()
        self._seen = Counts()
        self._took_s = 0.0
        self._has_rooms = False
        self._is_behind = False
        self._is_open = False
        self.crossings = Crossings(estimate_s, try_s)
        self.awaited: frozenset[str] = frozenset()
        self.began = 0.0
        self.asked: list[Asked] = []

    @property
    def is_on(self) -> bool:
        """Whether a claim has to look at limits: there are some, or lanes that stand under one still."""
        return bool(self._book.rules) or self._has_rooms

    @property
    def is_open(self) -> bool:
        """Whether this claim has counted what is in use."""
        return self._is_open

    @property
    def has_more(self) -> bool:
        """Whether another claim at once may let more go."""
        return self._rooms.has_more

    @property
    def opened(self) -> list[Brake]:
        """The breakers that are open, as of the last claim."""
        return [one for one in self._book.rules.brakes() if one.opened_us]

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

    def put_off(self, room: Room, need: Need | None) -> None:
        """Note that a step waits for a room that is full: for the end of other work, or for a time."""
        state = self._seen.states()[room.name]
        if state.is_counted:
            self._seen.awaited.add(room.name)
            self.awaited = self._seen.holders()
        self._rooms.sooner([state.plan_us(self._seen.now_us, need)])

    def poll_s(self, poll_s: float, parked_s: float) -> float:
        """Return after how long to claim again: sooner while lanes wait for work to end, or for a time."""
        if self._seen.awaited:
            poll_s = min(poll_s, parked_s)
        return self._rooms.poll_s(poll_s, self._took_s)

    async def begin(self, database: EngineDatabase) -> None:
        """Make ready for a claim; reads outside of it what has changed by more than it may read itself."""
        self._seen = Counts()
        self._rooms.begin(self._seen)
        self._is_open = False
        self.crossings.begin()
        self.awaited = frozenset()
        self.began = 0.0
        self.asked = []
        if self._is_behind:
            await self._book.learn(database)
            self._is_behind = False

    async def open(self, con: Connection, slots: Mapping[str, int]) -> bool:
        """Count what is in use and wake what may find room, before the claim reads heads of these queues.

        `slots` is how many of each the claim can let go at most. False when more has changed than is to be read
        here: this claim claims nothing, the next one begins with it.
        """
        names = list(slots)
        if self._book.rules.has_tokens:
            await self.reservations.settle(con, self._seen)
        began = time.monotonic()
        now, *rows = await con.fetch(
            _SQL["rooms"],
            names,
            self._able,
            self._book.version,
            MOST_NEWS,
            *self._rooms.page(names),
            PATIENCE_S,
        )
        self._seen.now_us, self._rooms.next_us = now["us"], now["lane_id"]
        self.began = began + now["org_id"] / 1e6
        is_known = await self._book.catch_up(con, now["n"])
        self._seen.rules = self._book.rules
        await self._correct(con)
        if not is_known:
            await self.spend(con)
            self._is_behind = True
            return False
        self._is_open = True
        self.crossings.begin(row["room"] for row in rows if row["kind"] == "crossing")
        for row in rows:
            if row["kind"] == "held":
                self._seen.add_held(row["capability"], self._book.places(row), row["n"])
            elif row["kind"] == "seated":
                self._seen.add_held(row["capability"], self._book.needed(row), row["n"])
        stands, cut = self._rooms.turn(names, [row for row in rows if row["kind"] == "room"])
        if self._book.rules.has_tokens:
            await self.meter(con, self._placed(base_of(one.room)[0] for one in stands))
        asked = [row for row in rows if row["kind"] == "asked"]
        chosen = await self._keep(con, [row for row in rows if row["kind"] == "waiting"], asked)
        await self._rooms.wake(con, stands, chosen, slots, self.crossings, self.use_s)
        if told := [name for name in now["keys"] or () if name not in cut]:
            await con.execute(_SQL["told"], told, now["n"])
        await self.spend(con)
        self.awaited = self._seen.holders()
        self._took_s = time.monotonic() - self.began
        return True

    def note(self, first: Record, last: Record) -> bool:
        """Note what the first and last row of heads tell; False when this claim should have looked at other limits."""
        self._has_rooms = first["weight"] > 0
        is_old = last["org_id"] != self._book.version
        if self._is_open:
            return not is_old
        self._is_behind = is_old
        return not (is_old or self._has_rooms)

    async def read(self, con: Connection, rows: Sequence[Record]) -> None:
        """Read the meters of rates that hold for these lanes, and how orgs stand in crossings that they need."""
        places = [place for row in rows for place in self._book.places(row)]
        await self.meter(con, places)
        if self.crossings.known:
            met = {one for one in places if one.room.text in self.crossings.known}
            rooms = [self._seen.state(*one).room for one in met]
            await self.crossings.read(con, rooms, [row["org_id"] for row in rows])

    def rooms(self, row: Record) -> list[Room]:
        """Return the rooms in which every item of a lane takes a place."""
        lane = (row["org_id"], row["lane_id"])
        return self._seen.rooms(lane, row["capability"], self._book.places(row))

    def tries(self, row: Record) -> Mapping[str, float] | None:
        """Return the expected use of a try where a step has its places, not its run; None for lanes of no steps."""
        if not self.crossings.known or APART not in row["keys"]:
            return None
        use_s = self.crossings.try_s(row["capability"].rstrip(ALONE))
        return {place.room.text: use_s for place in self._book.needed(row)}

    def use_s(self, row: Record) -> float:
        """Return for how long an item of a lane is expected to use a room: a try of its step, or the whole run."""
        own = self.tries(row) or {}
        use_s = own.get(row["room"])
        return self.crossings.estimate_s(row["capability"]) if use_s is None else use_s

    def need(self, row: Record) -> int:
        """Return how many tokens every item of a lane takes where these are limited."""
        if not self._book.rules.has_tokens:
            return 1
        return self.reservations.need(row, self._book.places(row), self._book.of_step(row))

    async def close(
        self,
        con: Connection,
        shares: Sequence[Share],
        run_of: Mapping[tuple[int, uuid.UUID], tuple[int, uuid.UUID]],
        step_of: Mapping[tuple[int, uuid.UUID], str],
    ) -> None:
        """Store what was spent and where the lanes that were looked at stand.

        `run_of` names the runs that were taken for steps in line, `step_of` these steps.
        """
        seen = self._seen
        await self.spend(con)
        states = seen.states()
        crowded = {key: base_of(key[0]) for key in self._rooms.crowded}
        await self._rooms.plan(
            con,
            {key: states[name].plan_us(seen.now_us, need) for key, (name, need) in crowded.items()},
        )
        lanes = [
            (share, lane)
            for share in shares
            for lane in share.lanes
            if lane.taken or lane.full is not None or (lane.is_spent and lane.is_whole)
        ]
        if lanes:
            await self._park(con, lanes)
            await self.reservations.store(con, lanes, run_of, step_of)
        await self.crossings.close(con, lanes)
        seen.add_taken(lanes)
        self.awaited = seen.holders()

    def paced(self, shares: Sequence[Share]) -> set[tuple[int, uuid.UUID]]:
        """Return what was taken that a rate let go, as org and item."""
        return self._seen.paced(shares)

    async def spend(self, con: Connection) -> None:
        """Store how far rates are used by now."""
        if meters := self._seen.meters():
            await con.execute(_SQL["spend"], *([one[nth] for one in meters] for nth in range(3)))

    async def _park(self, con: Connection, lanes: Sequence[tuple[Share, Lane]]) -> None:
        stands = [self._stand(share, lane) for share, lane in lanes]
        full = {name: base_of(name) for name in stands if name is not None}
        states = self._seen.states()
        under = [states[name] for name, _ in full.values()]
        due = [
            one.plan_us(self._seen.now_us, need)
            for one, (_, need) in zip(under, full.values(), strict=True)
        ]
        # Where needs differ there are no turns.
        shared = [
            name
            for name, (base, need) in full.items()
            if need is None and RoomId.parse(base).org_id == NO_ORG
        ]
        crossed = await con.fetch(
            _SQL["park"],
            [share.org_id for share, _ in lanes],
            [lane.lane_id for _, lane in lanes],
            stands,
            [share.virtual_s for share, _ in lanes],
            [
                self._seen.can_wait((share.org_id, lane.lane_id), lane.need, lane.needs)
                for share, lane in lanes
            ],
            [lane.taken > 0 for _, lane in lanes],
            list(full),
            due,
            [one.in_use + one.room.went for one in under],
            [one.rule.maximum for one in under],
            self._book.version,
            MAX_WAITERS,
            shared,
        )
        await self.crossings.cross(con, [row["room"] for row in crossed])
        self._has_rooms = self._has_rooms or bool(full)
        self._seen.awaited |= {one.room.name for one in under if one.is_counted}
        self._rooms.sooner(due)

    async def meter(self, con: Connection, places: Sequence[Place]) -> None:
        """Read the meters of rates in these rooms that were not read yet."""
        texts = {place.room.text for place in places if place.rule.is_metered}
        if texts := texts - self._seen.tats.keys():
            self._seen.tats |= dict.fromkeys(texts)
            rows = await con.fetch(_SQL["meters"], list(texts))
            self._seen.tats |= {row["room"]: row["tat_us"] for row in rows}
            self._seen.paces |= {row["room"]: row["pace"] for row in rows}

    async def _correct(self, con: Connection) -> None:
        """Move the meters of tokens by what turned out to be used, or not to be."""
        if self._seen.deltas:
            places = self._placed(self._seen.deltas)
            await self.meter(con, places)
            for place in places:
                self._seen.state(*place)

    def _placed(self, names: Iterable[str]) -> list[Place]:
        """Return rooms with the limits that hold there now; those without one are left out."""
        rooms = [RoomId.parse(name) for name in names]
        rules = [(room, self._book.rules.rule_of(room)) for room in rooms]
        return [Place(room, rule) for room, rule in rules if rule is not None]

    def _stand(self, share: Share, lane: Lane) -> str | None:
        """Name where a lane stands that found a room full; None where it did not."""
        if lane.full is None:
            return None
        need = self.reservations.need_in((share.org_id, lane.lane_id), lane.full.name)
        return stand_of(lane.full, need)

    async def _keep(
        self, con: Connection, rows: Sequence[Record], asked: Sequence[Record]
    ) -> list[tuple[int, int]]:
        """Keep room for heads and steps that waited long; returns the lanes of heads that can go here and now."""
        await self.read(con, rows)
        waiting = await self._steps(con, asked)
        closed: list[tuple[int, int]] = []
        for row in rows:
            need, needs = self.need(row), self.reservations.needs(row)
            if self._seen.is_closed(self._book.places(row), need, needs):
                closed.append((row["org_id"], row["lane_id"]))
                continue
            one = Waiting(
                org_id=row["org_id"],
                lane_id=row["lane_id"],
                since_us=row["us"],
                rooms=self.rooms(row),
                need=need,
                needs=needs,
            )
            waiting.append((one, bool(row["n"])))
        if closed:
            await con.execute(
                _SQL["forget"], [org_id for org_id, _ in closed], [lane_id for _, lane_id in closed]
            )
        return keep(waiting)

    async def _steps(self, con: Connection, rows: Sequence[Record]) -> list[tuple[Waiting, bool]]:
        """Note the steps that wait beside working branches, and return those for which room is to be kept."""
        needs = [(row, self._book.needed(row)) for row in rows]
        await self.meter(con, [place for _, places in needs for place in places])
        found: list[tuple[Waiting, bool]] = []
        for nth, (row, places) in enumerate(needs, 1):
            need = self.reservations.need_of_try(row, places)
            one = Asked.of(row, [self.room(place) for place in places], nth, need)
            self.asked.append(one)
            is_old = self._seen.now_us - one.since_us >= PATIENCE_S * 1e6
            if is_old and places and not self._seen.is_closed(places, need):
                found.append((one.waiting, False))
        return found
