"""Crossings: what a claim reads and writes of rooms that lanes of several queues need, so that orgs take turns there.

Called by `limiting`, within the claim's transaction and after its lock; the turns are decided by `turns`. Invariants: a
room that orgs share becomes a crossing as lanes of a second queue are parked there; where there is none nothing is read
or written; every claim that lets work through one stores what its org has used.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.accounts import Crossing, stands_s
from millpond.engine.admission import Lane, Room, Share

_SQL = queries("crossings")
# Of one crossing so many lanes are woken by a claim.
_MAX_WOKEN = 32


class Crossings:
    """The crossings as one claim finds them.

    `estimate_s` is the expected service of work by its capability, `try_s` the expected use of a try of its steps.
    """

    def __init__(
        self, estimate_s: Callable[[str], float], try_s: Callable[[str], float] | None = None
    ) -> None:
        self.estimate_s = estimate_s
        self._try_s = try_s or estimate_s
        self._expected: dict[str, float] = {}
        self._orgs: set[int] = set()
        self._riding: Mapping[str, AbstractSet[int]] = {}
        self.known: frozenset[str] = frozenset()
        self.met: list[Crossing] = []

    def begin(self, known: Iterable[str] = ()) -> None:
        """Begin a claim in which these rooms are crossings."""
        self.known = frozenset(known)
        self.met = []
        self._expected = {}
        self._orgs = set()
        self._riding = {}

    def try_s(self, able: str) -> float:
        """Return what a try of a step is charged in this claim; what is learned meanwhile changes nothing."""
        found = self._expected.get(able)
        if found is None:
            found = self._expected[able] = self._try_s(able)
        return found

    async def read(
        self,
        con: Connection,
        rooms: Iterable[Room],
        orgs: Iterable[int],
        riding: Mapping[str, AbstractSet[int]] | None = None,
    ) -> None:
        """Read where these orgs stand in those of the rooms that are crossings, beside what was read of this claim.

        Of the orgs that are `riding` steps wait there, by room.
        """
        met = {room.name: room for room in rooms if room.name in self.known}
        if not met:
            return
        met |= {one.room.name: one.room for one in self.met}
        self._orgs |= set(orgs)
        self._riding = riding or self._riding
        rows = await con.fetch(_SQL["standing"], list(met), list(self._orgs))
        stand: dict[str, dict[int, float]] = defaultdict(dict)
        waiting: dict[str, set[int]] = defaultdict(set)
        clocks: dict[str, float] = {}
        for row in rows:
            clocks[row["room"]] = row["clock_s"]
            if row["org_id"] is not None:
                stand[row["room"]][row["org_id"]] = row["virtual_s"]
            if row["is_waiting"]:
                waiting[row["room"]].add(row["org_id"])
        for name, of in self._riding.items():
            waiting[name] |= of
        self.met = [
            Crossing(room=met[name], since_s=at_s, virtual_s=stand[name], waiting=waiting[name])
            for name, at_s in clocks.items()
        ]

    async def next_lanes(
        self,
        con: Connection,
        rooms: Mapping[str, int],
        slots: Mapping[str, int],
        able: Sequence[str],
        use_s: Callable[[Record], float],
    ) -> list[tuple[int, int]]:
        """Return which lanes (org, lane) to wake under rooms that have so many places, by what their orgs have used.

        Not more of a queue than it has slots for. `use_s` is for how long an item of a lane is expected to use a room.
        """
        if not rooms:
            return []
        rows = await con.fetch(
            _SQL["waiting"],
            list(rooms),
            [min(most, _MAX_WOKEN) for most in rooms.values()],
            list(slots),
            list(slots.values()),
            list(able),
        )
        by_room: dict[str, list[Record]] = defaultdict(list)
        for row in rows:
            by_room[row["room"]].append(row)
        return [
            lane
            for name, found in by_room.items()
            for lane in _next(found, rooms[name], slots, use_s)
        ]

    async def close(self, con: Connection, lanes: Sequence[tuple[Share, Lane]]) -> None:
        """Store what was used by the lanes and steps of this claim, and where the lanes stand that it parked."""
        if not self.met:
            return
        shares = {id(share): share for share, _ in lanes}.values()
        at_s: dict[tuple[int, str], float] = {}
        parked: list[tuple[int, int]] = []
        for one in self.met:
            at_s |= {(org, one.room.name): at for org, at in one.reached(shares).items()}
            for share, lane in lanes:
                if lane.full is one.room:
                    parked.append((share.org_id, lane.lane_id))
                    place = (share.org_id, one.room.name)
                    at_s.setdefault(place, one.began_s(share.org_id))
            for org_id in self._riding.get(one.room.name, ()):
                at_s.setdefault((org_id, one.room.name), one.began_s(org_id))
        if not at_s:
            return
        await con.execute(
            _SQL["spend"],
            [one.room.name for one in self.met],
            [one.clock_s for one in self.met],
            [org_id for org_id, _ in at_s],
            [name for _, name in at_s],
            list(at_s.values()),
            [org_id for org_id, _ in parked],
            [lane_id for _, lane_id in parked],
        )

    async def cross(self, con: Connection, rooms: Iterable[str]) -> None:
        """Let rooms be crossings from now on under which lanes of several queues stand."""
        if new := [room for room in rooms if room not in self.known]:
            await con.execute(_SQL["cross"], new)

    async def meet(self, con: Connection, stands: AbstractSet[tuple[str, str]]) -> None:
        """Let rooms be crossings from now on in which steps of a queue stand (room, queue), and work of another."""
        if new := [one for one in stands if one[0] not in self.known]:
            columns = [[one[nth] for one in new] for nth in range(2)]
            rows = await con.fetch(_SQL["meet"], *columns)
            await self.cross(con, [row["room"] for row in rows])

    def through(self, rooms: Iterable[Room]) -> list[Crossing]:
        """Return those of the crossings that are among these rooms."""
        ids = {id(room) for room in rooms} if self.met else ()
        return [one for one in self.met if id(one.room) in ids]

    def names(self, lane: Lane) -> tuple[str, ...]:
        """Return the crossings that work of a lane goes through: a run, not the step for whose sake it goes."""
        tries = lane.tries or {}
        return tuple(
            one.room.name for one in self.through(lane.rooms) if one.room.name not in tries
        )

    def tries(self, lane: Lane) -> tuple[str, ...]:
        """Return those that the step goes through for whose sake a run of a lane goes."""
        return tuple(
            name for name in lane.tries or () if any(name == c.room.name for c in self.met)
        )


def _next(
    rows: Sequence[Record], most: int, slots: Mapping[str, int], use_s: Callable[[Record], float]
) -> Iterable[tuple[int, int]]:
    """Yield the lanes of a room to wake, each of the org that will have used it least by then."""
    woken = Counter([row["queue"] for row in rows if row["is_awake"]])
    left = most - sum(min(count, slots[queue]) for queue, count in woken.items())
    lanes: dict[int, list[Record]] = defaultdict(list)
    for row in reversed(rows):
        if not row["is_awake"]:
            lanes[row["org_id"]].append(row)
    heap = [
        (stands_s(of[0]["clock_s"], of[0]["virtual_s"], is_waiting=True), org_id)
        for org_id, of in lanes.items()
    ]
    heapq.heapify(heap)
    while heap and left > 0:
        at_s, org_id = heapq.heappop(heap)
        row = lanes[org_id].pop()
        if woken[row["queue"]] < slots[row["queue"]]:
            woken[row["queue"]] += 1
            left -= 1
            at_s += use_s(row) / row["weight"]
            yield row["org_id"], row["lane_id"]
        if lanes[org_id]:
            heapq.heappush(heap, (at_s, org_id))


async def drop_over(database: EngineDatabase) -> int:
    """Take away crossings under which no lane stands any more; called by upkeep."""
    async with database.duty("drop_crossings") as con:
        gone: int = await con.fetchval(_SQL["drop_over"])
    return gone
