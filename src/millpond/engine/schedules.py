"""Schedules: what an org wants run at which times, as people write and read it.

Called by the API in an org transaction. Invariants: an expression and a zone are checked before they
are stored; the next due time is counted from the database's clock; a paused schedule has none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Literal

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.calendar import Missed, calendar
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict, NotFound
from millpond.types import Json, new_id

_SQL = queries("schedules")
Overlap = Literal["allow", "skip", "cancel_old"]
LABEL = "millpond.schedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a person decides of a schedule; `version` and `queue` None mean the newest and the flow's.

    `input` is any JSON that fits the flow's schema, which the caller has checked.
    """

    name: str
    flow: str
    cron: str
    version: int | None = None
    queue: str | None = None
    input: Json = field(default_factory=dict)
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    time_zone: str = "UTC"
    missed: Missed = "one"
    overlap: Overlap = "allow"
    is_paused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A stored schedule: the draft, and how far it has come."""

    schedule_id: uuid.UUID
    draft: Draft
    next_due_at: datetime | None
    last_due_at: datetime | None
    last_run_id: uuid.UUID | None
    last_error: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


_STATUS = frozenset(Schedule.__dataclass_fields__) - {"draft"}


async def create(con: Connection, org_id: int, draft: Draft, created_by: str) -> Schedule:
    """Store a schedule; raises InvalidInput, and Conflict when the org has one of that name."""
    schedule_id = new_id()
    made = await con.fetchval(
        _SQL["create"],
        org_id,
        schedule_id,
        *_columns(draft),
        await _next_due(con, draft),
        created_by,
    )
    if made is None:
        raise _name_taken(draft.name)
    return await get(con, org_id, schedule_id)


async def change(
    con: Connection, org_id: int, seen: Schedule, draft: Draft, changed_by: str
) -> Schedule:
    """Replace the draft of a schedule as it was seen; raises Conflict when it was changed meanwhile.

    A new expression, zone or pause counts the next due time anew, so that nothing of the time before
    is made up for.
    """
    same_times = _times(draft) == _times(seen.draft)
    changed = await con.fetchval(
        _SQL["change"],
        org_id,
        seen.schedule_id,
        *_columns(draft),
        await _next_due(con, draft),
        seen.updated_at,
        not same_times or seen.next_due_at is None,
        changed_by,
    )
    if changed is None:
        await get(con, org_id, seen.schedule_id)
        raise Conflict(
            f"schedule {seen.schedule_id} was changed by another request",
            code="changed_meanwhile",
            advice="read it again and repeat the change",
        )
    return await get(con, org_id, seen.schedule_id)


async def set_paused(
    con: Connection, org_id: int, schedule_id: uuid.UUID, changed_by: str, *, is_paused: bool
) -> Schedule:
    """Pause a schedule, or let it go on with the next due time from now."""
    seen = await get(con, org_id, schedule_id)
    if seen.draft.is_paused == is_paused and (is_paused or seen.next_due_at is not None):
        return seen
    return await change(con, org_id, seen, replace(seen.draft, is_paused=is_paused), changed_by)


async def delete(con: Connection, org_id: int, schedule_id: uuid.UUID) -> None:
    """Remove a schedule; its runs stay. Raises NotFound."""
    if await con.fetchval(_SQL["delete"], org_id, schedule_id) is None:
        raise _unknown(schedule_id)


async def get(con: Connection, org_id: int, schedule_id: uuid.UUID) -> Schedule:
    """Return one schedule; raises NotFound when the org has none with this id."""
    row = await con.fetchrow(_SQL["get"], org_id, schedule_id)
    if row is None:
        raise _unknown(schedule_id)
    return _schedule(row)


async def page(
    con: Connection, org_id: int, wanted: PageOf, name: str | None = None
) -> tuple[list[Schedule], bool]:
    """Return one page of schedules, newest first, and whether more follow; `name` names one."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "schedule_id", name)
    return [_schedule(row) for row in rows], has_more


async def upcoming(con: Connection, draft: Draft, count: int = 5) -> list[datetime]:
    """Return the next due times from now; none while paused."""
    if draft.is_paused:
        return []
    now = await con.fetchval(_SQL["now"])
    return list(islice(calendar(draft.cron, draft.time_zone).after(now), count))


async def note_started(
    con: Connection, org_id: int, schedule_id: uuid.UUID, run_id: uuid.UUID
) -> None:
    """Remember a run that a person started as the schedule's last one."""
    await con.execute(_SQL["started"], org_id, schedule_id, run_id)


async def _next_due(con: Connection, draft: Draft) -> datetime | None:
    checked = calendar(draft.cron, draft.time_zone)
    now = await con.fetchval(_SQL["now"])
    return None if draft.is_paused else checked.next_after(now)


def _times(draft: Draft) -> tuple[str, str, bool]:
    return draft.cron, draft.time_zone, draft.is_paused


def _columns(draft: Draft) -> tuple[object, ...]:
    return (
        draft.name,
        draft.flow,
        draft.version,
        draft.queue,
        orjson.dumps(draft.input).decode(),
        draft.priority,
        orjson.dumps(dict(draft.labels)).decode(),
        draft.cron,
        draft.time_zone,
        draft.missed,
        draft.overlap,
        draft.is_paused,
    )


def _schedule(row: Record) -> Schedule:
    status = {name: value for name, value in row.items() if name in _STATUS}
    given = {name: value for name, value in row.items() if name not in _STATUS}
    parsed = {name: orjson.loads(given[name]) for name in ("input", "labels")}
    return Schedule(draft=Draft(**{**given, **parsed}), **status)


def _name_taken(name: str) -> Conflict:
    return Conflict(
        f"a schedule named {name} exists",
        code="name_taken",
        param="name",
        advice="PATCH it instead",
    )


def _unknown(schedule_id: uuid.UUID) -> NotFound:
    return NotFound(f"schedule {schedule_id} does not exist", param="schedule_id")
