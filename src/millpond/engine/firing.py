"""Firing: due schedules become runs.

Called by maintenance in every worker. Invariants: a due time has one run at most, since its id follows
from schedule and time, and the runs are submitted in the transaction that moves the schedule on; a
schedule that cannot be fired says why and stands in nobody's way.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import orjson
import structlog

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import features, quotas, targets
from millpond.engine.calendar import LATE_S, calendar, missed_times
from millpond.engine.quotas import USED_UP, QuotaBusy
from millpond.engine.schedules import LABEL
from millpond.engine.submit import deadline_of, submit
from millpond.engine.targets import Target
from millpond.engine.waits import Readied
from millpond.errors import InvalidInput, MillpondError, Transient
from millpond.types import Intent

_SQL = queries("schedules")
_BATCH = 100
_LATE = timedelta(seconds=LATE_S)
FEATURE = "schedules"
TIME_LABEL = "millpond.scheduled_at"
_log = structlog.get_logger("millpond.firing")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What becomes of one due schedule; `cancels` is the run that the new one replaces."""

    row: Record
    next_due_at: datetime | None
    intents: Sequence[Intent] = ()
    last_due_at: datetime | None = None
    cancels: uuid.UUID | None = None
    error: str | None = None


def run_id_of(schedule_id: uuid.UUID, due_at: datetime) -> uuid.UUID:
    """Return the id of the run of a due time: a UUID of version 7 at that time, always the same."""
    millis = int(due_at.timestamp() * 1000)
    digest = hashlib.sha256(schedule_id.bytes + millis.to_bytes(8, "big")).digest()
    number = (millis << 80) | int.from_bytes(digest[:10], "big")
    number = (number & ~(0xF << 76)) | (0x7 << 76)
    number = (number & ~(0x3 << 62)) | (0x2 << 62)
    return uuid.UUID(int=number)


async def fire(database: EngineDatabase) -> list[Readied]:
    """Start what is due; returns the runs that may go on. One that fails is noted by itself."""
    try:
        async with database.duty("schedule") as con:
            return await _fire(con, _BATCH, None)
    except (InvalidInput, QuotaBusy):
        return await _fire_each(database)


async def _fire_each(database: EngineDatabase) -> list[Readied]:
    async with database.statement("due_ids") as con:
        due = await con.fetch(_SQL["due_ids"], _BATCH)
    readied: list[Readied] = []
    for row in due:
        try:
            async with database.duty("schedule_alone") as con:
                readied += await _fire(con, 1, row["schedule_id"])
        except QuotaBusy:
            continue  # it stays due
        except Transient:
            raise
        except MillpondError as error:
            _log.warning("schedule.stopped", schedule_id=str(row["schedule_id"]), error=error.code)
            async with database.duty("schedule_stopped") as con:
                note = f"{error.code}: {error.message}"
                await con.execute(_SQL["note_failure"], row["org_id"], row["schedule_id"], note)
    return readied


async def _fire(con: Connection, limit: int, only: uuid.UUID | None) -> list[Readied]:
    due = await con.fetch(_SQL["take_due"], limit, only, LATE_S)
    if not due:
        return []
    found = await targets.find(con, [(row["flow"], row["version"]) for row in due])
    plans: Sequence[_Plan] = [_plan(row, found.get((row["flow"], row["version"]))) for row in due]
    fresh = await _fresh(con, [intent for plan in plans for intent in plan.intents])
    fresh, plans = await _paid(con, fresh, plans)
    by_org = _by_org(fresh)
    for intents in by_org.values():
        await submit(con, intents)
    await _ask_cancels(con, plans)
    await _settle(con, plans)
    return [Readied(org_id=one.org_id, run_id=one.run_id, queue=one.queue) for one in fresh]


async def _fresh(con: Connection, intents: Sequence[Intent]) -> list[Intent]:
    """Leave out the runs that a due time has already had."""
    if not intents:
        return []
    rows = await con.fetch(
        _SQL["known_runs"], [one.org_id for one in intents], [one.run_id for one in intents]
    )
    known = {(row["org_id"], row["run_id"]) for row in rows}
    return [one for one in intents if (one.org_id, one.run_id) not in known]


def _by_org(intents: Sequence[Intent]) -> dict[int, list[Intent]]:
    by_org: dict[int, list[Intent]] = defaultdict(list)
    for intent in sorted(intents, key=lambda one: one.org_id):
        by_org[intent.org_id].append(intent)
    return by_org


async def _paid(
    con: Connection, fresh: Sequence[Intent], plans: Sequence[_Plan]
) -> tuple[list[Intent], Sequence[_Plan]]:
    """Leave out the runs that an org's plan does not have or pay for, and tell their schedules."""
    kept: list[Intent] = []
    refused: dict[uuid.UUID, str] = {}
    by_org = _by_org(fresh)
    without = await features.without(con, by_org.keys(), FEATURE)
    for org_id, intents in by_org.items():
        is_off = org_id in without
        allowed = 0 if is_off else await quotas.take_now(con, org_id, len(intents))
        kept += intents[:allowed]
        why = features.off(FEATURE) if is_off else USED_UP
        refused |= {one.run_id: why for one in intents[allowed:]}
    if not refused:
        return kept, plans
    return kept, [_unpaid(plan, refused) for plan in plans]


def _unpaid(plan: _Plan, refused: Mapping[uuid.UUID, str]) -> _Plan:
    paid = [one for one in plan.intents if one.run_id not in refused]
    if len(paid) == len(plan.intents):
        return plan
    why = next(refused[one.run_id] for one in plan.intents if one.run_id in refused)
    return replace(plan, intents=paid, cancels=plan.cancels if paid else None, error=why)


def _plan(row: Record, target: Target | None) -> _Plan:
    """Decide what a due schedule starts, and when it is due next."""
    try:
        of = calendar(row["cron"], row["time_zone"])
    except InvalidInput as error:
        return _Plan(row=row, next_due_at=None, error=f"{error.code}: {error.message}")
    next_due_at = of.next_after(row["now"])
    if target is None or not target.is_served:
        # What can be made up for is, once a worker has the flow again.
        is_over = row["missed"] == "skip" and row["now"] - row["next_due_at"] > _LATE
        held = next_due_at if is_over else row["next_due_at"]
        unserved = f"flow_not_served: no live worker has the flow {row['flow']}"
        return _Plan(row=row, next_due_at=held, error=unserved)
    if misfit := target.misfit(orjson.loads(row["input"])):
        return _Plan(row=row, next_due_at=next_due_at, error=misfit)
    times = missed_times(of, row["missed"], row["next_due_at"], row["now"])
    kept = _without_overlap(row, times)
    return _Plan(
        row=row,
        next_due_at=next_due_at,
        intents=[_intent(row, target, at) for at in kept],
        last_due_at=times[-1] if times else None,
        cancels=row["last_run_id"] if row["overlap"] == "cancel_old" and kept else None,
    )


def _without_overlap(row: Record, times: Sequence[datetime]) -> Sequence[datetime]:
    """Keep the times whose runs the overlap policy lets be: of several at once, one."""
    match row["overlap"]:
        case "skip":
            return [] if row["is_last_live"] else times[:1]
        case "cancel_old":
            return times[-1:]
        case _:
            return times


def _intent(row: Record, target: Target, due_at: datetime) -> Intent:
    at = due_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Intent(
        org_id=row["org_id"],
        run_id=run_id_of(row["schedule_id"], due_at),
        flow=target.flow,
        version=target.version,
        queue=row["queue"] or target.queue,
        input=row["input"].encode(),
        subject=f"service:schedule:{row['name']}",
        behind=[row["created_by"], *row["changed_by"]],
        priority=row["priority"],
        keys=target.keys,
        timeout_s=target.timeout_s,
        deadline_s=deadline_of(target.deadline_s),
        labels={**orjson.loads(row["labels"]), LABEL: row["name"], TIME_LABEL: at},
    )


async def _ask_cancels(con: Connection, plans: Sequence[_Plan]) -> None:
    old = [
        plan
        for plan in plans
        if plan.cancels is not None
        and plan.row["is_last_live"]
        and plan.cancels not in {intent.run_id for intent in plan.intents}
    ]
    if old:
        await con.execute(
            _SQL["ask_cancels"],
            [plan.row["org_id"] for plan in old],
            [plan.cancels for plan in old],
            [f"service:schedule:{plan.row['name']}" for plan in old],
            ["the schedule's next run took its place" for _ in old],
        )


async def _settle(con: Connection, plans: Sequence[_Plan]) -> None:
    await con.execute(
        _SQL["settle"],
        [plan.row["org_id"] for plan in plans],
        [plan.row["schedule_id"] for plan in plans],
        [plan.next_due_at for plan in plans],
        [plan.last_due_at for plan in plans],
        [plan.intents[-1].run_id if plan.intents else plan.row["last_run_id"] for plan in plans],
        [plan.error for plan in plans],
    )
