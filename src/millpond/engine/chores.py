"""Chores: what is done to runs right after the change that asked for it, in transactions of their own.

Called by a loop in every worker. Invariant: a chore goes in the transaction that carries it out, so that
it is done once; one that fails stays and does not hold up the others.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.operations import stop_live
from millpond.engine.waits import Readied
from millpond.errors import MillpondError

_SQL = queries("chores")
_log = structlog.get_logger("millpond.chores")
_BATCH = 100


@dataclass(kw_only=True, slots=True)
class Done:
    """What was done: runs told to stop or stopped, and runs that may go on by it."""

    cancelled: list[uuid.UUID] = field(default_factory=list)
    readied: list[Readied] = field(default_factory=list)
    has_more: bool = False


async def carry_out(database: EngineDatabase) -> Done:
    """Carry out the oldest chores that no other process is at."""
    done = Done()
    async with database.statement("chores") as con:
        rows = await con.fetch(_SQL["list"], _BATCH)
    for row in rows:
        try:
            await _cancel(database, row["org_id"], row["chore_id"], done)
        except MillpondError as error:
            _log.warning("chore.failed", chore_id=row["chore_id"], error=error.code)
    done.has_more = len(rows) == _BATCH and bool(done.cancelled)
    return done


async def _cancel(database: EngineDatabase, org_id: int, chore_id: int, done: Done) -> None:
    async with database.duty("chore") as con:
        chore = await con.fetchrow(_SQL["take"], org_id, chore_id)
        if chore is None:
            return
        stopped = await stop_live(con, org_id, chore["run_id"], chore["asked_by"], chore["reason"])
    if stopped is not None:
        done.cancelled.append(chore["run_id"])
        done.readied += stopped.readied
