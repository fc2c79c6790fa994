"""Seats that a token does not carry: those of people who are in too many orgs for it.

Called by the gate, for their tokens alone. Invariant: a seat is read as it is now, and refused like a signed one once
it has changed.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.identity.passport import Passport, seats_of

_SQL = queries("people")


class Seating:
    """Looks for somebody's seat in the org that they name."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def seated(self, passport: Passport, wanted: str) -> Passport:
        """Return the passport with the seat in the org wanted by id or slug, or with none when there is none."""
        user_id = uuid.UUID(passport.subject.removeprefix("user:"))
        async with self._db.globals() as con:
            row = await con.fetchrow(_SQL["seat_in"], user_id, wanted)
        seats = [] if row is None else seats_of([dict(row)])
        return replace(passport, seats=seats, is_in_many=False)
