"""Lent rights: an operator whom an owner let in becomes a principal of the org.

Called by the gate for operators without a place in the org they name. Invariant: without an open grant the
answer is that of an org which does not exist; with one, the principal names the grant and its owner.
"""

from __future__ import annotations

import uuid

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.identity.passport import Passport, not_in_org
from millpond.identity.permissions import LENT_READ, LENT_WRITE
from millpond.types import Principal, Standing

_SQL = queries("grants")
ROLE = "operator"


class Lending:
    """Looks for the grant by which an operator is in an org."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def admit(self, passport: Passport, wanted: str) -> Principal:
        """Return the operator's principal in the org wanted by id or slug; raises Forbidden."""
        operator_id = uuid.UUID(passport.subject.removeprefix("user:"))
        async with self._db.globals() as con:
            org_id = await con.fetchval(_SQL["find_org"], wanted)
        if org_id is None:
            raise not_in_org()
        async with self._db.org(org_id) as con:
            grant = await con.fetchrow(_SQL["open"], org_id, operator_id)
        if grant is None:
            raise not_in_org()
        return Principal(
            org_id=org_id,
            subject=passport.subject,
            permissions=LENT_READ if grant["is_read_only"] else LENT_WRITE,
            roles=frozenset({ROLE}),
            standing=Standing(
                stamp=passport.stamp, session_id=passport.session_id, grant_id=grant["grant_id"]
            ),
            granted_by=grant["granted_by"],
        )
