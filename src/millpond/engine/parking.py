"""Parking: steps of a run that goes to wait stand in line for room, each in the lane of all its keys.

Called by `waits`, which holds the run's live row locked. Invariant: a step stands in one line at most, at the place
of the first time that it had no room; the claim that has room for it, and for its run, takes both (`boarding`).
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.lanes import KEY_SEPARATOR, RESUME_LEAD_US, RESUMED, lane_id, offset_us
from millpond.engine.leases import Lease
from millpond.engine.needs import Ask, joined, need_id
from millpond.engine.registry import capability

_SQL = queries("needs")


async def stand(con: Connection, lease: Lease, asks: Sequence[Ask]) -> None:
    """Let these steps of a run stand in line, and no others."""
    run = await con.fetchrow(_SQL["run"], lease.org_id, lease.run_id)
    assert run is not None
    able = capability(run["flow"], run["version"])
    lanes = [joined(run["keys"], one.keys) for one in asks]
    await con.execute(
        _SQL["stand"],
        lease.org_id,
        lease.run_id,
        [one.step_key for one in asks],
        [KEY_SEPARATOR.join(one.keys) for one in asks],
        [
            RESUMED
            | lane_id(
                queue=run["queue"],
                org_id=lease.org_id,
                capability=able,
                keys=keys,
                priority=run["priority"],
                urgency=run["urgency"],
            )
            for keys in lanes
        ],
        [KEY_SEPARATOR.join(keys) for keys in lanes],
        [one.since_us for one in asks],
        run["queue"],
        able,
        offset_us(run["priority"], run["urgency"]) - RESUME_LEAD_US,
        [need_id(lease.org_id, lease.run_id, one.step_key) for one in asks],
    )
