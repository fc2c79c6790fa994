"""What people and programs may at this moment: the engine's question before a step acts for one.

Given to the worker by `cli`. Invariant: one statement of the engine's role answers, across orgs, through a
function that reads what decides rights and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.db.pool import EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.rights import Held, Holder
from millpond.identity.permissions import LENT_READ, LENT_WRITE, permissions_of

_SQL = queries("current_rights")


class CurrentRights:
    """Reads rights from the database, every time."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database

    async def held(self, holders: Sequence[Holder]) -> list[Held]:
        """Return what each may now, in order; raises Transient when the database is away."""
        async with self._database.statement("rights") as con:
            rows = await con.fetch(
                _SQL["now"],
                [one.org_id for one in holders],
                [one.subject for one in holders],
                [one.lent for one in holders],
            )
        return [_held(row) for row in rows]


def _held(row: Record) -> Held:
    if row["denied"] is not None:
        return Held(denied=row["denied"])
    if row["is_read_only"] is not None:
        return Held(permissions=LENT_READ if row["is_read_only"] else LENT_WRITE)
    allowed = permissions_of(row["role"], row["custom"])
    return Held(permissions=allowed if row["scopes"] is None else allowed & set(row["scopes"]))
