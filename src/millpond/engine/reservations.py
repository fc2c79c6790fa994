"""Reservations: tokens that leases have of limits, from the claim that lets work go to the one that settles them.

Called by `limiting`, within the claim's transaction and after its lock. Invariants: only claims write reservations;
what work used is told in the transaction of its record and taken in by the next claim, so that meters are moved by
claims alone; a lease that a rescue ended keeps what it had reserved.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.admission import Lane, Share
from millpond.engine.counting import Counts, weighed
from millpond.engine.lanes import ALONE, KEY_SEPARATOR
from millpond.engine.rules import Place, RoomId
from millpond.engine.tokens import Need, Needs, carried, parts_of

_SQL = queries("reservations")


class Reservations:
    """What one claimer knows of tokens: what work used that declares nothing, and in a claim what lanes need."""

    def __init__(self) -> None:
        self._learned = Needs()
        self._lanes: dict[tuple[int, int], tuple[str, str]] = {}
        self.needs: dict[tuple[int, int], Need] = {}

    async def settle(self, con: Connection, seen: Counts) -> None:
        """Settle what was reserved: notes by limit how many tokens more were used, or fewer, and what is awaited."""
        self._lanes, self.needs = {}, {}
        deltas: Counter[str] = Counter()
        for row in await con.fetch(_SQL["settle"]):
            if not row["capability"]:
                seen.awaited.add(row["room"])
                continue
            deltas[row["room"]] += row["delta"]
            if row["used"] is not None:
                self._learned.learn(row["capability"], row["used"])
        seen.deltas = dict(deltas)

    def need(self, row: Record, places: Sequence[Place]) -> int:
        """Return how many tokens each item of a lane takes of limits; 1 where none of its limits is on tokens."""
        able = row["capability"].rstrip(ALONE)
        need = weighed(self._learned.need(able, row["keys"]), places)
        if need is None:
            return 1
        lane = (row["org_id"], row["lane_id"])
        self.needs[lane] = need
        self._lanes[lane] = (able, KEY_SEPARATOR.join(carried(row["keys"])))
        return need.tokens

    async def store(
        self,
        con: Connection,
        lanes: Sequence[tuple[Share, Lane]],
        run_of: Mapping[tuple[int, uuid.UUID], tuple[int, uuid.UUID]],
    ) -> None:
        """Store what was taken of limits on tokens, for each lease; that of a step in line is its run's."""
        if not self.needs:
            return
        # A run that was taken for several of its steps has reserved as much as they need together.
        taken: dict[tuple[int, uuid.UUID, str], tuple[int, str, str]] = {}
        for share, lane in lanes:
            names = [room.name for room in lane.rooms if room.is_weighed]
            for item in lane.items[: lane.taken] if names else ():
                of = run_of.get((share.org_id, item), (share.org_id, item))
                for name in names:
                    before, _, _ = taken.get((*of, name), (0, "", ""))
                    able, keys = self._lanes[share.org_id, lane.lane_id]
                    taken[*of, name] = (before + lane.need, able, keys)
        if taken:
            rows = [(*of, *needs) for of, needs in taken.items()]
            parts = [KEY_SEPARATOR.join(parts_of(RoomId.parse(one[2]).key)) for one in rows]
            await con.execute(_SQL["reserve"], *map(list, zip(*rows, strict=True)), parts)


async def drop_unlimited(database: EngineDatabase) -> int:
    """Delete what no claim takes away any more, since no limit on tokens is left; called by upkeep."""
    async with database.duty("drop_reservations") as con:
        gone: int = await con.fetchval(_SQL["drop_unlimited"])
    return gone
