"""Waits: sleeps and backoffs are recorded, runs rest and are readied again.

Called by `context`, `performing` and `executor` (record, park, release), and by whoever makes a condition true, such as
`timers` and `questions` (ready). Invariants: the run's live row is locked first, then what it waits for; going to wait
checks every condition again under that lock, and whoever makes a condition true takes it too, so that no wake-up is
lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import parking
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.lanes import ALONE, PRIORITY_STEP_US, RESUME_LEAD_US, SUSPECT_DEATHS
from millpond.engine.leases import Lease, hold
from millpond.engine.needs import Ask
from millpond.types import Json

_SQL = queries("waits")
NOTHING: Mapping[str, Ask] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Readied:
    """A run that may go on, and the queue to hint."""

    org_id: int
    run_id: uuid.UUID
    queue: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wake:
    """A locked live row to ready, with the event to store for it, if any."""

    org_id: int
    run_id: uuid.UUID
    event: Fact | None = None
    is_death: bool = False


async def ready(con: Connection, wakes: Sequence[Wake]) -> list[Readied]:
    """Queue runs again; the caller holds their live rows locked.

    Those already queued, and those that stand still blocked, are left and not returned.
    """
    if not wakes:
        return []
    rows = await con.fetch(
        _SQL["ready"],
        [wake.org_id for wake in wakes],
        [wake.run_id for wake in wakes],
        [wake.event.kind if wake.event else None for wake in wakes],
        [wake.event.encoded() if wake.event else None for wake in wakes],
        [int(wake.is_death) for wake in wakes],
        PRIORITY_STEP_US,
        RESUME_LEAD_US,
        SUSPECT_DEATHS,
        ALONE,
    )
    return [Readied(org_id=row[0], run_id=row[1], queue=row[2]) for row in rows]


async def record_sleep(
    database: EngineDatabase,
    lease: Lease,
    *,
    step_key: str,
    name: str,
    seconds: float,
    seq: int | None = None,
) -> None:
    """Store that the run sleeps from now on, with its timer."""
    async with database.duty("sleep") as con:
        await hold(con, lease)
        if not await con.fetchval(
            _SQL["record_wait"],
            lease.org_id,
            lease.run_id,
            step_key,
            name,
            "sleep",
            lease.attempt,
            seq,
        ):
            return
        due_at = await con.fetchval(
            _SQL["set_timer"], lease.org_id, lease.run_id, step_key, "sleep", seconds
        )
        fact = Fact("sleep.started", step_key, {"name": name, "until": due_at})
        await append(con, lease.org_id, lease.run_id, [fact], duties=Duty.WAITS)


async def oblige(database: EngineDatabase, lease: Lease, duty: Duty) -> None:
    """Set durably what the end of the run has to see to."""
    async with database.duty("oblige") as con:
        await hold(con, lease)
        await append(con, lease.org_id, lease.run_id, [], duties=duty)


async def record_backoff(
    database: EngineDatabase, lease: Lease, *, step_key: str, delay_s: float
) -> None:
    """Set the timer of a step's next try; the step itself is recorded as retrying before."""
    async with database.duty("backoff") as con:
        await hold(con, lease)
        await con.fetchval(
            _SQL["set_timer"], lease.org_id, lease.run_id, step_key, "retry", delay_s
        )
        await append(con, lease.org_id, lease.run_id, [], duties=Duty.WAITS)


async def release(database: EngineDatabase, lease: Lease, *, reason: str) -> list[Readied]:
    """Hand a run back to its queue, no try counted: another worker goes on with it."""
    async with database.duty("release") as con:
        await hold(con, lease)
        await con.execute(_SQL["unlease"], lease.org_id, lease.item_id, lease.token)
        fact = Fact("run.released", None, {"reason": reason})
        return await ready(con, [Wake(org_id=lease.org_id, run_id=lease.run_id, event=fact)])


async def back_off(
    database: EngineDatabase,
    lease: Lease,
    *,
    delay_s: float,
    error: Json,
    tries: int,
    was_lined: bool = False,
) -> None:
    """Let a run wait before its flow body is tried again; one that shall stop goes on at once.

    Steps of one that `was_lined` stand in line no more.
    """
    async with database.duty("retry") as con:
        if await hold(con, lease):
            delay_s = 0.0
        await con.execute(_SQL["unlease"], lease.org_id, lease.item_id, lease.token)
        if was_lined:
            await parking.stand(con, lease, [])
        await con.fetchval(_SQL["set_timer"], lease.org_id, lease.run_id, "", "retry", delay_s)
        data = orjson.dumps({"error": error, "tries": tries, "delay_s": round(delay_s, 3)}).decode()
        await con.execute(
            _SQL["rest"], lease.org_id, lease.run_id, "waiting", "run.retrying", data, 1
        )


async def now(database: EngineDatabase) -> datetime:
    """Return the database's time in UTC."""
    async with database.statement("now") as con:
        at: datetime = await con.fetchval(_SQL["now"])
    return at.astimezone(UTC)


async def retrying_s(database: EngineDatabase, lease: Lease) -> float:
    """Return for how many seconds a run's flow body has been tried again, by the database's clock."""
    async with database.statement("retrying") as con:
        seconds: float | None = await con.fetchval(_SQL["retrying_s"], lease.org_id, lease.run_id)
    return seconds or 0.0


async def wake_waiting(con: Connection, org_id: int, run_id: uuid.UUID, *facts: Fact) -> Readied:
    """Store the facts; ready the run if it waits. A running one finds the answer as it parks."""
    await append(con, org_id, run_id, facts)
    row = await con.fetchrow(_SQL["lock_run"], org_id, run_id)
    if row is not None and row["state"] in ("waiting", "awaiting_input"):
        for readied in await ready(con, [Wake(org_id=org_id, run_id=run_id)]):
            return readied
    return Readied(org_id=org_id, run_id=run_id, queue="")
