"""The rule book: all limits and brakes as one process knows them, kept up by reading what was changed.

Called by `limiting`. Invariants: a claim reads no more than a few changes under its lock, whoever changes limits and
however many there are; the book is what the database had at its version or later, and never goes back.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.brakes import Brake
from millpond.engine.lanes import ALONE
from millpond.engine.needs import APART, needed, of_step, parted
from millpond.engine.rules import BRAKE, Place, Rule, Rules
from millpond.types import NO_ORG

_SQL = queries("limiting")
# So many changes are read within a claim; whoever has missed more reads them before one.
MOST_NEWS = 100
_PAGE = 1000
_MAX_KNOWN = 50_000


class RuleBook:
    """The limits at `version`, and which rooms lanes need by them."""

    def __init__(self) -> None:
        self.version = 0
        self.rules = Rules()
        self._places: dict[int, dict[int, tuple[Place, ...]]] = {}
        self._known = 0

    def places(self, row: Record) -> tuple[Place, ...]:
        """Return the rooms of a lane; what a lane is never changes, so that they are found once."""
        org_id, lane_id = row["org_id"], row["lane_id"]
        of_org = self._places.setdefault(org_id, {})
        places = of_org.get(lane_id)
        if places is None:
            if self._known >= _MAX_KNOWN:
                self._forget()
                of_org = self._places.setdefault(org_id, {})
            able = row["capability"].rstrip(ALONE)
            places = self.rules.places(org_id, row["queue"], able, row["keys"])
            of_org[lane_id] = places
            self._known += 1
        return places

    def needed(self, row: Record) -> tuple[Place, ...]:
        """Return the rooms of a step's try beside those of its run; `keys` of the row are those of both."""
        able = row["capability"].rstrip(ALONE)
        return needed(self.rules, row["org_id"], row["queue"], able, *parted(row["keys"]))

    def of_step(self, row: Record) -> tuple[Place, ...]:
        """Return the limits on tokens in which a step in line takes what it needs itself; `row` is its lane's."""
        if APART not in row["keys"]:
            return ()
        able = row["capability"].rstrip(ALONE)
        return of_step(self.rules, row["org_id"], row["queue"], able, row["keys"])

    async def catch_up(self, con: Connection, version: int) -> bool:
        """Read the changes up to `version` within a claim; False leaves them to `learn`: they are too many."""
        if not 0 <= version - self.version <= MOST_NEWS:
            return False
        if version == self.version:
            return True
        return self._follow(await con.fetch(_SQL["changes"], self.version, MOST_NEWS + 1))

    async def learn(self, database: EngineDatabase) -> None:
        """Read all that was changed, page by page, outside of claims."""
        async with database.statement("limits_version") as con:
            if await con.fetchval(_SQL["version"]) < self.version:
                self.version = -1  # another past than this one: a restored database
        while True:
            async with database.statement("limits_changes") as con:
                rows = await con.fetch(_SQL["changes"], self.version, _PAGE)
            if not self._follow(rows):
                await self._read_all(database)
            elif len(rows) < _PAGE:
                return

    def _follow(self, rows: Sequence[Record]) -> bool:
        """Take over changes; returns whether none is missing before them."""
        if self.version < 0 or (rows and rows[0]["version"] != self.version + 1):
            return False
        for row in rows:
            self._take_over(row)
            self.version = row["version"]
        return True

    def _take_over(self, row: Record) -> None:
        if row["kind"] == BRAKE:
            self.rules.brake(row["owner"], row["key"], _brake(row))
        elif row["maximum"] is None:
            self.rules.drop(row["owner"], row["key"], row["kind"])
        else:
            self.rules.put(_rule(row))
        if row["owner"] == NO_ORG:
            self._forget()
        else:
            self._known -= len(self._places.pop(row["owner"], ()))

    async def _read_all(self, database: EngineDatabase) -> None:
        """Read every limit; what is changed meanwhile is read again as a change."""
        async with database.statement("limits_newest") as con:
            version = await con.fetchval(_SQL["version"])
        rules, after = Rules(), (-1, "", "")
        while True:
            async with database.statement("limits_whole") as con:
                rows = await con.fetch(_SQL["rules"], *after, _PAGE)
            for row in rows:
                if row["kind"] == BRAKE:
                    rules.brake(row["owner"], row["key"], _brake(row))
                else:
                    rules.put(_rule(row))
            if len(rows) < _PAGE:
                break
            after = (rows[-1]["owner"], rows[-1]["key"], rows[-1]["kind"])
        self.rules, self.version = rules, version
        self._forget()

    def _forget(self) -> None:
        self._places.clear()
        self._known = 0


def _rule(row: Record) -> Rule:
    return Rule(
        owner=row["owner"],
        key=row["key"],
        kind=row["kind"],
        maximum=row["maximum"],
        period_s=row["period_s"],
        burst=row["burst"],
        of_org=row["of_org"],
    )


def _brake(row: Record) -> Brake | None:
    """Return the brake of a row, None for one that was taken off."""
    if row["until_us"] is None:
        return None
    return Brake(
        owner=row["owner"],
        key=row["key"],
        until_us=row["until_us"],
        factor=row["factor"],
        in_use=row["in_use"],
        hits=row["hits"],
        opened_us=row["opened_us"],
        step=row["step"],
        reason=row["reason"],
    )
