"""Meters: those of rates that tell nothing any more are deleted, a few at a time.

Called by `upkeep`, outside of claims. Invariant: a meter that a claim has moved since it was read here stays, so that
nothing that was spent is forgotten.
"""

from __future__ import annotations

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.rulebook import RuleBook
from millpond.engine.rules import RoomId

_SQL = queries("limiting")
_PAGE = 500


class Meters:
    """Looks through all meters, page by page; one that is past means as much as none."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._book = RuleBook()
        self._after = ""

    async def sweep(self) -> int:
        """Look at the next page; returns how many of it were deleted: past ones, and those of no rate that is set."""
        async with self._database.statement("old_meters") as con:
            rows = await con.fetch(_SQL["old_meters"], self._after, _PAGE)
        self._after = rows[-1]["room"] if len(rows) == _PAGE else ""
        if not all(row["is_past"] for row in rows):
            await self._book.learn(self._database)
        over = [
            row
            for row in rows
            if row["is_past"] or self._book.rules.rule_of(RoomId.parse(row["room"])) is None
        ]
        if not over:
            return 0
        async with self._database.statement("drop_meters") as con:
            gone: int = await con.fetchval(
                _SQL["drop_meters"], [row["room"] for row in over], [row["tat_us"] for row in over]
            )
        return gone
