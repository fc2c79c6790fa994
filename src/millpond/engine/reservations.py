"""Reservations: tokens that leases and tries of steps have of limits, from the claim that lets go to the settling one.

Called by `limiting` and `boarding`, within the claim's transaction and after its lock. Invariants: only claims write
reservations; what work used is told in the transaction of its record and taken in by the next claim, so that meters
are moved by claims alone; in no limit has a step a reservation beside one of its run; a lease that a rescue ended
keeps what it had reserved, and so do tries that were under way.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.admission import Lane, Share
from millpond.engine.counting import Counts, weighed
from millpond.engine.lanes import ALONE, KEY_SEPARATOR
from millpond.engine.needs import parted
from millpond.engine.rules import Place, RoomId
from millpond.engine.tokens import Need, Needs, carried, parts_of, tried_by

_SQL = queries("reservations")


_Id = tuple[int, uuid.UUID]  # org, and work item or step in line
_LaneId = tuple[int, int]


class Needing(NamedTuple):
    """What each item of a lane, or a try of a step, needs in limits on tokens.

    `learned_as` names the work by which others learn from what it uses, `carried` has its providers and models.
    """

    need: Need
    learned_as: str
    carried: str


class Taken(NamedTuple):
    """Tokens that work under a lease takes of one limit; `step_key` is '' for the work item itself."""

    org_id: int
    item_id: uuid.UUID
    step_key: str
    room: str
    tokens: int
    learned_as: str
    carried: str


class Reservations:
    """What one claimer knows of tokens: what work used that declares nothing, and in a claim what lanes need."""

    def __init__(self) -> None:
        self._learned = Needs()
        self._lanes: dict[_LaneId, Needing] = {}
        # What steps in line need themselves, and how much that is by limit.
        self._lines: dict[_LaneId, Needing] = {}
        self._needs: dict[_LaneId, dict[str, int]] = {}

    async def settle(self, con: Connection, seen: Counts) -> None:
        """Settle what was reserved: notes by limit how many tokens more were used, or fewer, and what is awaited."""
        self._lanes, self._lines, self._needs = {}, {}, {}
        deltas: Counter[str] = Counter()
        for row in await con.fetch(_SQL["settle"]):
            if not row["capability"]:
                seen.awaited.add(row["room"])
                continue
            deltas[row["room"]] += row["delta"]
            if row["used"] is not None:
                self._learned.learn(row["capability"], row["used"])
        seen.deltas = dict(deltas)

    def need(self, row: Record, places: Sequence[Place], of_step: Sequence[Place] = ()) -> int:
        """Return how many tokens each item of a lane takes of limits; 1 where none of its limits is on tokens.

        `of_step` are those of the limits in which a step in line takes what it needs itself (`needs`).
        """
        able, lane = row["capability"].rstrip(ALONE), (row["org_id"], row["lane_id"])
        run_keys, step_keys = parted(row["keys"])
        line = self.of_try(able, run_keys, step_keys, of_step)
        if line is not None:
            self._lines[lane] = line
            self._needs[lane] = dict.fromkeys((one.room.text for one in of_step), line.need.tokens)
            places = [one for one in places if one not in of_step]
        need = weighed(self._learned.need(able, run_keys), places)
        if need is None:
            return 1
        self._lanes[lane] = Needing(need, able, KEY_SEPARATOR.join(carried(run_keys)))
        return need.tokens

    def needs(self, row: Record) -> Mapping[str, int] | None:
        """Return what a step in line in a lane needs itself, by limit; None where there is nothing of that."""
        return self._needs.get((row["org_id"], row["lane_id"]))

    def need_of_try(self, row: Record, places: Sequence[Place]) -> int:
        """Return how many tokens the try of a step takes that asks beside its run; 1 where none are limited."""
        able = row["capability"].rstrip(ALONE)
        needing = self.of_try(able, *parted(row["keys"]), places)
        return 1 if needing is None else needing.need.tokens

    def need_in(self, lane: _LaneId, room: str) -> Need | None:
        """Return what a lane that was read needs in a limit on tokens."""
        of = self._lines if room in self._needs.get(lane, ()) else self._lanes
        return of[lane].need if lane in of else None

    def of_try(
        self, able: str, run_keys: Sequence[str], step_keys: Sequence[str], places: Sequence[Place]
    ) -> Needing | None:
        """Return what a try of a step needs in those of its places that are limits on tokens; None without any."""
        if not any(place.rule.is_of_tokens for place in places):
            return None
        learned_as = tried_by(able, step_keys)
        need = weighed(self._learned.need(learned_as, step_keys), places)
        assert need is not None
        keys = dict.fromkeys([*carried(run_keys), *carried(step_keys)])
        return Needing(need, learned_as, KEY_SEPARATOR.join(keys))

    async def store(
        self,
        con: Connection,
        lanes: Sequence[tuple[Share, Lane]],
        run_of: Mapping[_Id, _Id],
        step_of: Mapping[_Id, str],
    ) -> None:
        """Store what was taken of limits on tokens, for each lease; `run_of` and `step_of` tell of steps in line."""
        if not (self._lanes or self._lines):
            return
        # A run that was taken for several of its steps has reserved as much as they need together.
        taken: dict[tuple[_Id, str, str], Taken] = {}
        for share, lane in lanes:
            at = (share.org_id, lane.lane_id)
            rooms = [room for room in lane.rooms if room.is_weighed]
            for item in lane.items[: lane.taken] if rooms else ():
                one = (share.org_id, item)
                of = run_of.get(one, one)
                for room in rooms:
                    is_of_step = room.name in self._needs.get(at, ())
                    needing = (self._lines if is_of_step else self._lanes)[at]
                    key = of, step_of[one] if is_of_step else "", room.name
                    before = taken[key].tokens if key in taken else 0
                    taken[key] = Taken(
                        *of, *key[1:], before + lane.cost(room), needing.learned_as, needing.carried
                    )
        await self.reserve(con, list(taken.values()))

    async def reserve(self, con: Connection, taken: Sequence[Taken]) -> None:
        """Store what leases have taken of limits on tokens."""
        if taken:
            parts = [KEY_SEPARATOR.join(parts_of(RoomId.parse(one.room).key)) for one in taken]
            columns = ([one[nth] for one in taken] for nth in range(len(Taken._fields)))
            await con.execute(_SQL["reserve"], *columns, parts)


async def drop_unlimited(database: EngineDatabase) -> int:
    """Delete what no claim takes away any more, since no limit on tokens is left; called by upkeep."""
    async with database.duty("drop_reservations") as con:
        gone: int = await con.fetchval(_SQL["drop_unlimited"])
    return gone
