"""Blocking: runs that stand still because their code does not match their history, or cannot end, and steps likewise.

Called by `executor` and `step_executor` (block) and by the API (resume). Invariants: what is blocked keeps all that
is recorded, and nothing but a person, by resume or cancel of the run, sets it going again; the live row of a step is
locked before that of its run.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace

import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import waits
from millpond.engine.events import Fact, append
from millpond.engine.leases import Lease, hold
from millpond.engine.waits import Readied, Wake
from millpond.errors import Conflict, LeaseLost, NotFound
from millpond.types import Json

_SQL = queries("blocking")
_WAITS = queries("waits")
_RUNS = queries("operations")
_STEPS = queries("remote")


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


async def block_step(
    database: EngineDatabase, lease: Lease, reason: Mapping[str, Json], step: Fact
) -> None:
    """Let a step that executes elsewhere stand still; `step` is the event that tells of it, without the reason."""
    org_id, run_id = lease.org_id, lease.run_id
    own = [org_id], [lease.item_id], [lease.token]
    async with database.duty("block_step") as con:
        if not await con.fetch(_STEPS["hold"], *own):
            raise LeaseLost("the lease is gone")
        if not await con.fetch(_STEPS["lock_runs"], [org_id], [run_id]):
            await con.execute(_STEPS["drop"], *own)
            return
        await con.execute(_WAITS["unlease"], org_id, lease.item_id, lease.token)
        text = orjson.dumps(reason).decode()
        await con.execute(_SQL["block_step"], org_id, lease.item_id, text)
        await append(con, org_id, run_id, [replace(step, data={**(step.data or {}), **reason})])


async def resume(con: Connection, org_id: int, run_id: uuid.UUID, subject: str) -> list[Readied]:
    """Queue a blocked run, and steps of it that are blocked, again; the caller commits, then hints.

    Raises NotFound, and Conflict when nothing of the run is blocked.
    """
    steps = [row["item_id"] for row in await con.fetch(_SQL["lock_steps"], org_id, run_id)]
    live = await con.fetchrow(_SQL["lock_blocked"], org_id, run_id)
    if live is None and await con.fetchrow(_RUNS["outcome"], org_id, run_id) is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    if live is None or not (live["is_blocked"] or steps):
        raise Conflict(
            f"run {run_id} is not blocked",
            code="not_blocked",
            advice="only a run that stands still needs to be resumed",
        )
    blocked = [run_id, *steps] if live["is_blocked"] else steps
    await con.execute(_SQL["unblock"], org_id, blocked)
    await append(con, org_id, run_id, [Fact("run.unblocked", None, {"by": subject})])
    return await waits.ready(con, [Wake(org_id=org_id, run_id=one) for one in blocked])
