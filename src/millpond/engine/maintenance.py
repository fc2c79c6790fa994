"""Maintenance: rescue of leases whose worker is gone, due timers, deadlines, schedules, groups of events.

Called by a loop in every worker; one process at a time does the chores. Invariants: only missed
heartbeats end a lease, never elapsed work; after a gap in its own ticks, by its clock or by the
database's, or a restart of Postgres it waits one full lease and charges no death, since then everybody
was silent; nor does it for what a worker held that was told to end.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime

import structlog

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import deadlines, firing, inbound, poison, remote, timers, waits
from millpond.engine.deadlines import Expired
from millpond.engine.events import Fact
from millpond.engine.waits import Readied, Wake

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.maintenance")
_BATCH = 500
# A claim takes milliseconds.
_HELD_S = 10.0
# As long as Postgres lets the engine's sessions be idle in a transaction.
_SILENT_S = 3.0


class Maintenance:
    """The chores of one process; remembers its own ticks."""

    def __init__(self, database: EngineDatabase, *, lease_s: float) -> None:
        self._database = database
        self._lease_s = lease_s
        self._last_tick = time.monotonic()
        self._database_tick: datetime | None = None
        self._hold_until = 0.0

    def note(self, database_now: datetime, uptime_s: float) -> None:
        """Note that the database answered just now, with its time and for how long it has been up."""
        self._note_gap(time.monotonic(), database_now, uptime_s)

    async def rescue(self) -> list[Readied]:
        """Give back what dead workers held; returns the runs that may go on."""
        async with self._database.duty("rescue") as con:
            turn = await con.fetchrow(_SQL["take_turn"])
            assert turn is not None
            now = time.monotonic()
            # Also without the turn: who has it next must know of the gap.
            self._note_gap(now, turn["now"], turn["uptime_s"])
            if not turn["is_mine"] or now < self._hold_until:
                return []
            dead = await con.fetch(_SQL["expired_workers"])
            lost = await con.fetch(_SQL["orphaned"], _BATCH, self._lease_s)
            if not lost:
                return []
            deaths = self._deaths(lost, now)
            steps = [row for row in lost if row["kind"] == "step"]
            runs = [row for row in lost if row["kind"] == "run"]
            poisoned = [row for row in runs if row["token"] in deaths and poison.is_poison(row)]
            # The session of a worker that held more than a batch is gone since the first.
            heard_at = {row["worker_id"]: row["silent_at"] for row in lost}
            heard_at |= {row["worker_id"]: row["beat_at"] for row in dead}
            readied = await remote.rescue(con, steps, deaths=deaths, heard_at=heard_at)
            readied += await poison.fail(con, poisoned, heard_at)
            back = [row for row in runs if row not in poisoned]
            readied += await _give_back(con, back, deaths, heard_at)
        _log.warning(
            "runs.rescued",
            workers=[str(row["worker_id"]) for row in dead],
            runs=len(runs) - len(poisoned),
            poisoned=[str(row["run_id"]) for row in poisoned],
            steps=len(steps),
        )
        return readied

    def _note_gap(self, now: float, database_now: datetime, uptime_s: float) -> None:
        """Hold rescue for a lease where this process or the database slept, or did not reach each other.

        Then nobody could beat. This process's clock stands still while its machine is suspended, the
        database's, by which sessions expire, goes on.
        """
        last = self._database_tick or database_now
        passed_s = max(now - self._last_tick, (database_now - last).total_seconds())
        if uptime_s < self._lease_s or passed_s > self._lease_s / 2:
            self._hold_until = now + self._lease_s
        self._last_tick, self._database_tick = now, database_now

    def _deaths(self, lost: Sequence[Record], now: float) -> set[uuid.UUID]:
        """Return the tokens of lost leases whose workers died under them, as far as one can know."""
        if now - self._hold_until <= self._lease_s:
            return set()
        return {row["token"] for row in lost if not row["was_draining"]}

    async def free_claim(self, held_s: float = _HELD_S, silent_s: float = _SILENT_S) -> int:
        """End sessions that keep locks, the claim's above all, and whose clients are silent; returns how many.

        Postgres's own limits do not end a statement whose process was stopped before it took the answer, since what
        waits to be sent listens to nothing but the session's own end; nor a session whose client stopped in the middle
        of an exchange, between preparing a statement and executing it: to Postgres that is neither idle nor at work.
        """
        async with self._database.statement("free_claim") as con:
            ended: int = await con.fetchval(_SQL["free_claim"], held_s, silent_s)
        if ended:
            _log.error("claim.lock_freed", sessions=ended)
        return ended

    async def fire(self) -> Sequence[Readied]:
        """Let due timers take effect; returns the runs that may go on."""
        return await timers.fire(self._database, limit=_BATCH)

    async def expire(self) -> Expired:
        """End runs that were not over by their deadline, or ask their workers to."""
        return await deadlines.expire(self._database, limit=_BATCH)

    async def start_due(self) -> list[Readied]:
        """Start what schedules are due for; returns the new runs."""
        return await firing.fire(self._database)

    async def lapse(self) -> list[Readied]:
        """Start what events have waited for; returns the new runs."""
        return await inbound.lapse(self._database)


async def _give_back(
    con: Connection,
    lost: Sequence[Record],
    deaths: AbstractSet[uuid.UUID],
    heard_at: Mapping[uuid.UUID, datetime],
) -> list[Readied]:
    """Remove leases whose live rows are locked and queue their work again."""
    await con.execute(
        _SQL["unlease"],
        [row["org_id"] for row in lost],
        [row["item_id"] for row in lost],
        [row["token"] for row in lost],
        [heard_at.get(row["worker_id"]) for row in lost],
    )
    return await waits.ready(
        con,
        [
            Wake(
                org_id=row["org_id"],
                run_id=row["item_id"],
                event=Fact("run.rescued", None, {"attempt": row["attempt"]}),
                is_death=row["token"] in deaths,
            )
            for row in lost
        ],
    )
