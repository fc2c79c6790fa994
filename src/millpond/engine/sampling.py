"""Sampling: looks once a second at how full limits and queues are, and adds that up.

Called by `upkeep` in every worker; one process at a time looks. Invariants: it takes no lock that a claim
takes; a second is counted once, whoever looks: of two that look at once the first to store it; one in which nobody
looked is not counted; what it keeps is gone after an hour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import fullness
from millpond.engine.counting import Counts, base_of
from millpond.engine.fullness import Added, Before, QueueSeen
from millpond.engine.needs import APART
from millpond.engine.rulebook import RuleBook
from millpond.engine.rules import BRAKE, RoomId, Rule
from millpond.engine.tokens import MOST_TOKENS
from millpond.types import Json

_SQL = queries("sampling")
# Of each look at most: so many full rooms are told of, so many rooms and parked lanes are looked at.
_MAX_FULL = 1000
_MAX_ROOMS = 5000
_MAX_LANES = 5000


class Sampler:
    """The looks of one process; knows the limits."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._book = RuleBook()
        self._is_behind = False

    async def sample(self) -> bool:
        """Look, unless somebody did within the last moment; returns whether it looked."""
        if self._is_behind:
            await self._book.learn(self._database)
            self._is_behind = False
        async with self._database.statement("sample_look") as con:
            turn = await con.fetchrow(_SQL["look"])
        if turn is None:
            return False
        queues = [_queue(row) for row in orjson.loads(turn["queues"])]
        before = Before.read(orjson.loads(turn["seen"]))
        added = [Added("seen", "", turn["passed_s"])]
        added += fullness.of_queues(queues, before, turn["passed_s"])
        if self._book.version != turn["version"] or self._book.rules or turn["has_rooms"]:
            async with self._database.duty("sample_limits", durable=False) as con:
                self._is_behind = not await self._book.catch_up(con, turn["version"])
                if not self._is_behind:
                    added += await self._limits(con, turn)
                return await _remember(con, turn, queues, added)
        async with self._database.statement("sample") as con:
            return await _remember(con, turn, queues, added)

    async def _limits(self, con: Connection, turn: Record) -> list[Added]:
        waiting: dict[str, int] = {}
        for row in await con.fetch(_SQL["rooms"], _MAX_ROOMS):
            name, need = base_of(row["room"])
            waiting[name] = min(waiting.get(name, MOST_TOKENS), 1 if need is None else need.tokens)
        full = await self._full(con, turn["now_us"], waiting)
        orgs = [row["org_id"] for row in await con.fetch(_SQL["parked_orgs"], _MAX_LANES)]
        # Those first under which work waits: what is not told of counts as not full.
        chosen = sorted(full, key=lambda name: (name not in waiting, name))[:_MAX_FULL]
        return [
            *fullness.of_rooms(chosen, waiting.keys(), turn["passed_s"]),
            *fullness.of_orgs(orgs[:_MAX_FULL], turn["passed_s"]),
        ]

    async def _full(self, con: Connection, now_us: int, waiting: Mapping[str, int]) -> set[str]:
        """Return the rooms that have no place, whose rate lets nothing go now, or that have too few tokens.

        `waiting` has what lanes need that stand there, the least of it; 1 but for tokens.
        """
        spent = await con.fetch(_SQL["spent"], now_us, _MAX_ROOMS)
        seen = Counts(
            now_us=now_us,
            tats={row["room"]: row["tat_us"] for row in spent},
            paces={row["room"]: row["pace"] for row in spent},
            rules=self._book.rules,
        )
        rooms: dict[RoomId, Rule] = {}
        for row in await con.fetch(_SQL["held"]):
            is_of_step = APART in row["keys"]
            places = self._book.needed(row) if is_of_step else self._book.places(row)
            seen.add_held(row["capability"], places, row["n"])
            rooms.update(place for place in places if not place.rule.is_metered)
        for text in {*waiting, *seen.tats}:
            room = RoomId.parse(text)
            rule = self._book.rules.rule_of(room)
            if rule is not None:
                rooms[room] = rule
        return {
            room.text
            for room, rule in rooms.items()
            if room.kind != BRAKE and seen.state(room, rule).room.left < waiting.get(room.text, 1)
        }


async def _remember(
    con: Connection, turn: Record, queues: Sequence[QueueSeen], added: Sequence[Added]
) -> bool:
    """Store a look; returns whether it counts, since nobody else looked meanwhile."""
    status = await con.execute(
        _SQL["remember"],
        turn["before_at"],
        turn["now"],
        orjson.dumps(fullness.kept(queues)).decode(),
        turn["bucket_at"],
        *([one[nth] for one in added] for nth in range(len(Added._fields))),
    )
    return status != "INSERT 0 0"


def _queue(row: Mapping[str, Json]) -> QueueSeen:
    return QueueSeen(
        name=row["queue"],
        slots=row["slots"],
        in_use=row["in_use"],
        waits=row["waits"],
        went=row["went"],
    )
