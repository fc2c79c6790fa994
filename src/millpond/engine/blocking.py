"""Blocking: runs that stand still because their code does not match their history, or cannot end.

Called by `executor` (block) and by the API (resume). Invariant: a blocked run keeps all that is recorded,
and nothing but a person, by resume or cancel, sets it going again.
"""

from __future__ import annotations

import uuid

import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import waits
from millpond.engine.claim import Lease, hold
from millpond.engine.events import Fact
from millpond.engine.waits import Readied, Wake
from millpond.errors import Conflict, NotFound
from millpond.types import Json

_SQL = queries("blocking")
_WAITS = queries("waits")
_RUNS = queries("operations")


async def block(
    database: EngineDatabase, lease: Lease, reason: Json, *, heeds_cancel: bool
) -> list[Readied]:
    """Let the run stand still, with the event that tells the reason.

    One that was asked to stop is queued instead, to do that, unless it does not heed it; it is returned.
    """
    async with database.duty("block") as con:
        is_cancelled = await hold(con, lease)
        await con.execute(_WAITS["unlease"], lease.org_id, lease.item_id, lease.token)
        if is_cancelled and heeds_cancel:
            return await waits.ready(con, [Wake(org_id=lease.org_id, run_id=lease.run_id)])
        text = orjson.dumps(reason).decode()
        await con.execute(_SQL["block"], lease.org_id, lease.run_id, text)
        return []


async def resume(con: Connection, org_id: int, run_id: uuid.UUID, subject: str) -> Readied:
    """Queue a blocked run again; the caller commits, then hints.

    Raises NotFound, and Conflict when the run is not blocked.
    """
    live = await con.fetchrow(_SQL["lock_blocked"], org_id, run_id)
    if live is None and await con.fetchrow(_RUNS["outcome"], org_id, run_id) is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    if live is None or not live["is_blocked"]:
        raise Conflict(
            f"run {run_id} is not blocked",
            code="not_blocked",
            advice="only a run that stands still needs to be resumed",
        )
    await con.execute(_SQL["unblock"], org_id, run_id)
    fact = Fact("run.unblocked", None, {"by": subject})
    return (await waits.ready(con, [Wake(org_id=org_id, run_id=run_id, event=fact)]))[0]
