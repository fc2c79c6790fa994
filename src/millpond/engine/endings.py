"""Endings: what the end of a run sees to beyond its own rows, in the transaction of that end.

Called by `commit` for runs that a worker ends and by `operations` for runs that nobody executes.
Invariant: the caller has removed the live rows in this transaction, so that nothing is added to these
runs any more; locks are taken from a child up to its parent, never down.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import remote
from millpond.engine.duties import Duty
from millpond.engine.waits import Readied

_SQL = queries("endings")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A run that ends in this transaction; `outcome` is succeeded, failed or cancelled."""

    org_id: int
    run_id: uuid.UUID
    duties: Duty
    outcome: str


async def see_to(con: Connection, ended: Sequence[Ended]) -> list[Readied]:
    """Do what the duties of ended runs ask for; returns other runs that may go on by it."""
    if waiting := [one for one in ended if Duty.WAITS in one.duties]:
        await con.execute(_SQL["drop_waits"], *_columns(waiting))
    if holding := [one for one in ended if Duty.KEY in one.duties]:
        await con.execute(_SQL["free_keys"], *_columns(holding))
    if senders := [one for one in ended if Duty.CHILDREN in one.duties]:
        await remote.stop(con, *_columns(senders))
    return []


def _columns(ended: Sequence[Ended]) -> tuple[list[int], list[uuid.UUID]]:
    return [one.org_id for one in ended], [one.run_id for one in ended]
