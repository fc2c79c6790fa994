"""Timers: sleeps, tries, expiries and starts that are due.

Called by `maintenance`. Invariant: the live rows of their runs are locked first, then timers are taken, so that each
takes effect once.
"""

from __future__ import annotations

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine import questions
from millpond.engine.events import Fact
from millpond.engine.waits import Readied, Wake, ready

_SQL = queries("waits")


async def fire(database: EngineDatabase, *, limit: int = 500) -> list[Readied]:
    """Let due timers take effect; returns the runs that may go on."""
    async with database.statement("due") as con:
        due = await con.fetch(_SQL["due"], limit)
    if not due:
        return []
    async with database.duty("timers") as con:
        runs = sorted({(row["org_id"], row["run_id"]) for row in due})
        locked = {
            (row["org_id"], row["run_id"]): row["state"]
            for row in await con.fetch(
                _SQL["lock_items"], [org for org, _ in runs], [run for _, run in runs]
            )
        }
        mine = [row for row in due if (row["org_id"], row["run_id"]) in locked]
        if len(mine) < len(due):
            await con.execute(
                _SQL["sweep_timers"],
                [row["org_id"] for row in due],
                [row["run_id"] for row in due],
                [row["step_key"] for row in due],
            )
        taken = await con.fetch(
            _SQL["take_timers"],
            [row["org_id"] for row in mine],
            [row["run_id"] for row in mine],
            [row["step_key"] for row in mine],
        )
        sleeps = [row for row in taken if row["kind"] == "sleep"]
        if sleeps:
            await con.execute(
                _SQL["end_sleeps"],
                [row["org_id"] for row in sleeps],
                [row["run_id"] for row in sleeps],
                [row["step_key"] for row in sleeps],
            )
        signals = [row for row in taken if row["kind"] == "signal"]
        if signals:
            await con.execute(
                _SQL["end_signal_waits"],
                [row["org_id"] for row in signals],
                [row["run_id"] for row in signals],
                [row["step_key"] for row in signals],
            )
        for row in taken:
            if row["kind"] == "expiry":
                await questions.expire(con, row["org_id"], row["run_id"], row["step_key"])
        starts = {(row["org_id"], row["run_id"]) for row in taken if row["kind"] == "start"}
        woken = {(row["org_id"], row["run_id"]) for row in taken}
        return await ready(
            con,
            [
                Wake(
                    org_id=org_id,
                    run_id=run_id,
                    event=Fact("run.queued") if (org_id, run_id) in starts else None,
                )
                for org_id, run_id in sorted(woken)
                if locked[org_id, run_id] != "running"
            ],
        )
