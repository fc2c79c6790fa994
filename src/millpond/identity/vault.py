"""The vault: opens a secret for a run's step.

Given to the worker by `cli`, which sees to it that the run may. Invariant: a value is handed to `engine.opening` alone,
and stands in no error.
"""

from __future__ import annotations

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.engine.vault import Opened
from millpond.errors import NotFound
from millpond.identity.ring import KeyRing
from millpond.identity.secret_store import bound_to

_SQL = queries("secrets")


class Vault:
    """Opens secrets of any org with the installation's keys."""

    def __init__(self, db: Database, ring: KeyRing) -> None:
        self._db = db
        self._ring = ring

    async def open(self, org_id: int, name: str, *, is_use: bool = True) -> Opened:
        """Return a secret's value; raises NotFound, Transient without its key, and Permanent where it does not open.

        `is_use`: the list shall tell that it was used now.
        """
        async with self._db.org(org_id) as con:
            row = await con.fetchrow(_SQL["sealed"], org_id, name)
            if row is not None and is_use and row["is_due"]:
                await con.execute(_SQL["used"], org_id, row["secret_id"])
        if row is None:
            raise NotFound(
                f"there is no secret named {name}",
                code="secret_not_found",
                advice="store it with `millpond secrets set`",
            )
        words = bound_to(org_id, row["secret_id"])
        value = self._ring.open_or_wait(row["sealed"], row["seal_key_id"], *words)
        return Opened(name, row["version"], value.decode())
