"""Operations: what people do to runs from outside.

Called by the API in an org transaction; the caller commits, then hints. Invariant: the live row's
lock decides between cancel, wait and finish.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import waits
from millpond.engine.duties import Duty
from millpond.engine.endings import Ended, see_to
from millpond.engine.events import Fact, append
from millpond.engine.waits import Readied
from millpond.errors import Conflict, NotFound
from millpond.types import RunState

_SQL = queries("operations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """How a cancel left its run, and other runs that may go on by it."""

    state: RunState
    readied: Sequence[Readied] = ()


async def cancel(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    subject: str,
    reason: str = "",
    *,
    skip_endings: bool = False,
) -> RunState:
    """Cancel a run; returns `cancelled`, `running` while its worker is being told to stop, or `queued`.

    A begun run that has something to do before it may end is queued, for a worker to do that; with
    `skip_endings` it ends at once, unless a worker executes it, and that is left undone. Raises NotFound,
    and Conflict when the run has succeeded or failed. Asking twice is no error, nor is it after the end.
    """
    stopped = await stop(con, org_id, run_id, subject, reason, skip_endings=skip_endings)
    return stopped.state


async def stop(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    subject: str,
    reason: str = "",
    *,
    skip_endings: bool = False,
) -> Stopped:
    """Cancel a run as `cancel` does; tells also who may go on by it."""
    stopped = await stop_live(con, org_id, run_id, subject, reason, skip_endings=skip_endings)
    if stopped is not None:
        return stopped
    row = await con.fetchrow(_SQL["outcome"], org_id, run_id)
    if row is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    if row["outcome"] == RunState.CANCELLED:
        return Stopped(state=RunState.CANCELLED)
    raise Conflict(f"run {run_id} is already {row['outcome']}", code="already_finished")


async def stop_live(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    subject: str,
    reason: str = "",
    *,
    skip_endings: bool = False,
) -> Stopped | None:
    """Cancel a run as `stop` does; returns None when it is not live."""
    live = await con.fetchrow(_SQL["lock_live"], org_id, run_id)
    if live is None:
        return None
    data = {"by": subject, "reason": reason}
    has_ending = Duty.ENDING in Duty(live["duties"]) and live["attempt"] > 0
    if live["state"] == RunState.RUNNING or (has_ending and not skip_endings):
        await con.execute(_SQL["request_cancel"], org_id, run_id)
        if not live["cancel_requested"]:
            await append(con, org_id, run_id, [Fact("run.cancel_requested", None, data)])
        if live["state"] == RunState.RUNNING:
            return Stopped(state=RunState.RUNNING)
        readied = await waits.ready(con, [waits.Wake(org_id=org_id, run_id=run_id)])
        state = RunState.QUEUED if readied else RunState(live["state"])
        return Stopped(state=state, readied=readied)
    if has_ending:
        data["endings"] = "skipped"
    await append(con, org_id, run_id, [Fact("run.cancelled", None, data)])
    await con.execute(_SQL["unqueue"], org_id, live["lane_id"], live["rank"], run_id)
    await con.execute(_SQL["end_live"], org_id, run_id)
    await con.execute(_SQL["end_run"], org_id, run_id, live["attempt"], live["started_at"])
    ended = Ended(
        org_id=org_id, run_id=run_id, duties=Duty(live["duties"]), outcome=RunState.CANCELLED
    )
    readied = await see_to(con, [ended])
    return Stopped(state=RunState.CANCELLED, readied=readied)
