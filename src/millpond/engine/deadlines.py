"""Deadlines: a run that was not over in time ends as failed, wherever it stands.

Called by maintenance (expire) and by the executor for a run that was asked to stop. Invariants: the
run's live row is locked first; whoever asked a run to stop first, a person or its deadline, decides
how it ends.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.duties import Duty
from millpond.engine.encoding import dump_error
from millpond.engine.endings import Ended, see_to
from millpond.engine.leases import Lease
from millpond.engine.waits import Readied, Wake, ready
from millpond.errors import LeaseLost, Permanent
from millpond.types import Json, RunState

_SQL = queries("deadlines")
_Runs = list[tuple[int, uuid.UUID]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expired:
    """What deadlines did: runs that ended, running ones that are asked to stop, runs that may go on."""

    ended: Sequence[uuid.UUID] = ()
    told: Sequence[uuid.UUID] = ()
    readied: Sequence[Readied] = field(default_factory=list)


def exceeded() -> Json:
    """Return the error of a run that was not over by its deadline."""
    return dump_error(Permanent("the run was not over by its deadline", code="deadline_exceeded"))


async def expire(database: EngineDatabase, *, limit: int = 500) -> Expired:
    """End runs whose deadline has passed, or ask their workers to; those locked now come later."""
    async with database.statement("due_deadlines") as con:
        due = await con.fetch(_SQL["due"], limit)
    if not due:
        return Expired()
    async with database.duty("deadlines") as con:
        overdue = await _take(con, sorted((row["org_id"], row["run_id"]) for row in due))
        # A run with something left to do at its end goes on to do it, also when it waits now.
        told = [row for row in overdue if _goes_on(row)]
        idle = [row for row in overdue if not _goes_on(row)]
        if told:
            await con.fetch(_SQL["tell"], *_columns(told))
        woken = await ready(
            con,
            [
                Wake(org_id=row["org_id"], run_id=row["run_id"])
                for row in told
                if row["state"] != RunState.RUNNING
            ],
        )
        return Expired(
            ended=[row["run_id"] for row in idle],
            told=[row["run_id"] for row in told],
            readied=[*woken, *await _end(con, idle)],
        )


async def error_of(database: EngineDatabase, lease: Lease) -> Json:
    """Return the error with which a run that shall stop fails; None when a person cancelled it.

    Raises LeaseLost when the lease is gone.
    """
    async with database.statement("overdue") as con:
        is_overdue = await con.fetchval(
            _SQL["is_overdue"], lease.org_id, lease.item_id, lease.token
        )
    if is_overdue is None:
        raise LeaseLost("the lease is gone")
    return exceeded() if is_overdue else None


async def _take(con: Connection, runs: _Runs) -> list[Record]:
    """Lock runs that are free to lock and remove their deadlines; returns those this call took."""
    columns = [org for org, _ in runs], [run for _, run in runs]
    locked = await con.fetch(_SQL["lock"], *columns)
    if len(locked) < len(runs):
        await con.execute(_SQL["sweep"], *columns)
    taken = {tuple(row) for row in await con.fetch(_SQL["take"], *_columns(locked))}
    return [row for row in locked if (row["org_id"], row["run_id"]) in taken]


async def _end(con: Connection, idle: Sequence[Record]) -> list[Readied]:
    if not idle:
        return []
    error = orjson.dumps(exceeded()).decode()
    rows = await con.fetch(_SQL["end"], *_columns(idle), error)
    return await see_to(
        con,
        [
            Ended(org_id=org_id, run_id=run_id, duties=Duty(duties), outcome=RunState.FAILED)
            for org_id, run_id, duties in rows
        ],
    )


def _goes_on(row: Record) -> bool:
    return row["state"] == RunState.RUNNING or Duty.ENDING in Duty(row["duties"])


def _columns(rows: Sequence[Record]) -> tuple[list[int], list[uuid.UUID]]:
    return [row["org_id"] for row in rows], [row["run_id"] for row in rows]
