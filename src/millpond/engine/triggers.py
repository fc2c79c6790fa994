"""Triggers: which flow starts when which event arrives, as people write and read it.

Called by the API in an org transaction; flow modules import `EventInput` and `EventsInput`, which are
what a triggered flow gets. Invariant: a filter is a JSON schema that stands for itself, and a mode has
exactly the settings that it needs.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Generic, TypeVar

import orjson
from pydantic import BaseModel

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import targets
from millpond.engine.gathering import Mode, Rule
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.types import Json, new_id

_SQL = queries("triggers")
LABEL = "millpond.trigger"
MAX_PERIOD_S = 30 * 86_400.0
MAX_COUNT = 1000
MAX_LISTENERS = 100
# What each mode needs, and what it may have besides.
_NEEDS = {
    "each": (),
    "debounce": ("period_s",),
    "throttle": ("period_s",),
    "batch": ("max_wait_s", "max_count"),
}
_MAY = {"debounce": ("max_wait_s", "group_by"), "throttle": ("group_by",), "batch": ("group_by",)}
_SETTINGS = ("period_s", "max_wait_s", "max_count", "group_by")

Data = TypeVar("Data")


class InboundEvent(BaseModel, Generic[Data]):
    """An event as a flow gets it; `data` is what its sender gave."""

    id: str
    name: str
    data: Data
    received_at: datetime


class EventInput(BaseModel, Generic[Data]):
    """The input of a flow that a trigger of the mode `each`, `debounce` or `throttle` starts."""

    event: InboundEvent[Data]


class EventsInput(BaseModel, Generic[Data]):
    """The input of a flow that a trigger of the mode `batch` starts: events in order of arrival."""

    events: list[InboundEvent[Data]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a person decides of a trigger; `version` and `queue` None mean the newest and the flow's.

    `filter` is a JSON schema for the event's data; `group_by` a path in it, such as `customer.id`.
    """

    name: str
    event: str
    flow: str
    filter: Json = None
    version: int | None = None
    queue: str | None = None
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    mode: Mode = "each"
    group_by: str | None = None
    period_s: float | None = None
    max_wait_s: float | None = None
    max_count: int | None = None
    is_paused: bool = False

    @property
    def rule(self) -> Rule:
        """How events are gathered."""
        return Rule(
            mode=self.mode,
            period_s=self.period_s,
            max_wait_s=self.max_wait_s,
            max_count=self.max_count,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trigger:
    """A stored trigger; `dropped` counts events that matched and got no run."""

    trigger_id: uuid.UUID
    draft: Draft
    dropped: int
    last_error: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What waits for a trigger now; `dropped` is not yet in the trigger's own count."""

    groups: int
    events: int
    dropped: int


_STATUS = frozenset(Trigger.__dataclass_fields__) - {"draft"}


def check(draft: Draft) -> None:
    """Raise InvalidInput naming the field that does not fit the mode, or a filter that is no schema."""
    needs, may = _NEEDS[draft.mode], _MAY.get(draft.mode, ())
    for name in _SETTINGS:
        is_given = getattr(draft, name) is not None
        if name in needs and not is_given:
            raise InvalidInput(f"{name} is needed in the mode {draft.mode}", param=name)
        if is_given and name not in needs and name not in may:
            raise InvalidInput(f"{name} has no meaning in the mode {draft.mode}", param=name)
    if draft.group_by is not None and not all(draft.group_by.split(".")):
        raise InvalidInput(
            "group_by is names separated by dots, such as customer.id", param="group_by"
        )
    if draft.filter is not None:
        targets.check_filter(draft.filter)


def check_flow(draft: Draft, schema: Json) -> None:
    """Raise InvalidInput when a flow with this input schema could take no event of this trigger.

    What the event's data may be is not known here: it is checked when an event arrives. A schema that names
    its members has to name the one with the event, or the flow would start and never see it.
    """
    event = {"id": "1", "name": draft.event, "data": {}, "received_at": "2026-01-01T00:00:00Z"}
    is_batch = draft.mode == "batch"
    sample = {"events": [event]} if is_batch else {"event": event}
    place: list[str | int] = ["events", 0, "data"] if is_batch else ["event", "data"]
    faults = targets.faults_beyond(schema, sample, place)
    if not targets.keeps(schema, str(place[0])):
        faults.append(f"its input has no member {place[0]}")
    if faults:
        model = "EventsInput" if is_batch else "EventInput"
        raise InvalidInput(
            f"{draft.flow} does not take what this trigger gives it: {'; '.join(faults)}",
            param="flow",
            code="input_mismatch",
            advice=f"let the flow's input be millpond.engine.triggers.{model}",
        )


async def create(con: Connection, org_id: int, draft: Draft, created_by: str) -> Trigger:
    """Store a trigger; raises InvalidInput, and Conflict when the org has one of that name, or too many."""
    check(draft)
    if await con.fetchval(_SQL["listeners"], org_id, draft.event) >= MAX_LISTENERS:
        raise Conflict(
            f"the org has {MAX_LISTENERS} triggers for {draft.event}: one event starts no more",
            code="too_many_triggers",
            param="event",
            advice="let one flow start the others",
        )
    trigger_id = new_id()
    made = await con.fetchval(_SQL["create"], org_id, trigger_id, *_columns(draft), created_by)
    if made is None:
        raise Conflict(
            f"a trigger named {draft.name} exists",
            code="name_taken",
            param="name",
            advice="PATCH it instead",
        )
    return await get(con, org_id, trigger_id)


async def change(
    con: Connection, org_id: int, seen: Trigger, draft: Draft, changed_by: str
) -> Trigger:
    """Replace the draft of a trigger as it was seen; raises Conflict when it was changed meanwhile.

    What waits goes on waiting for the time that it was given.
    """
    check(draft)
    if await con.fetchval(
        _SQL["change"], org_id, seen.trigger_id, *_columns(draft), seen.updated_at, changed_by
    ):
        return await get(con, org_id, seen.trigger_id)
    await get(con, org_id, seen.trigger_id)
    raise Conflict(
        f"trigger {seen.trigger_id} was changed by another request",
        code="changed_meanwhile",
        advice="read it again and repeat the change",
    )


async def set_paused(
    con: Connection, org_id: int, trigger_id: uuid.UUID, changed_by: str, *, is_paused: bool
) -> Trigger:
    """Pause a trigger, which then takes no events and starts nothing, or let it go on."""
    seen = await get(con, org_id, trigger_id)
    if seen.draft.is_paused == is_paused:
        return seen
    changed = await change(con, org_id, seen, replace(seen.draft, is_paused=is_paused), changed_by)
    if not is_paused:
        await con.execute(_SQL["wake_groups"], org_id, trigger_id)
    return changed


async def delete(con: Connection, org_id: int, trigger_id: uuid.UUID) -> None:
    """Remove a trigger with what waits for it; its runs stay. Raises NotFound."""
    # Groups are locked before their trigger, as by events that arrive.
    await con.execute(_SQL["delete_groups"], org_id, trigger_id)
    if await con.fetchval(_SQL["delete"], org_id, trigger_id) is None:
        raise _unknown(trigger_id)


async def get(con: Connection, org_id: int, trigger_id: uuid.UUID) -> Trigger:
    """Return one trigger; raises NotFound when the org has none with this id."""
    row = await con.fetchrow(_SQL["get"], org_id, trigger_id)
    if row is None:
        raise _unknown(trigger_id)
    return _trigger(row)


async def page(
    con: Connection, org_id: int, wanted: PageOf, name: str | None = None
) -> tuple[list[Trigger], bool]:
    """Return one page of triggers, newest first, and whether more follow; `name` names one."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "trigger_id", name)
    return [_trigger(row) for row in rows], has_more


async def waiting(con: Connection, org_id: int, trigger_id: uuid.UUID) -> Waiting:
    """Return how much waits for a trigger."""
    row = await con.fetchrow(_SQL["waiting"], org_id, trigger_id)
    assert row is not None
    return Waiting(**row)


def _columns(draft: Draft) -> tuple[object, ...]:
    return (
        draft.name,
        draft.event,
        None if draft.filter is None else orjson.dumps(draft.filter).decode(),
        draft.flow,
        draft.version,
        draft.queue,
        draft.priority,
        orjson.dumps(dict(draft.labels)).decode(),
        draft.mode,
        draft.group_by,
        draft.period_s,
        draft.max_wait_s,
        draft.max_count,
        draft.is_paused,
    )


def _trigger(row: Record) -> Trigger:
    status = {name: value for name, value in row.items() if name in _STATUS}
    given = {name: value for name, value in row.items() if name not in _STATUS}
    parsed = {
        "filter": orjson.loads(given["filter"]) if given["filter"] else None,
        "labels": orjson.loads(given["labels"]),
    }
    return Trigger(draft=Draft(**{**given, **parsed}), **status)


def _unknown(trigger_id: uuid.UUID) -> NotFound:
    return NotFound(f"trigger {trigger_id} does not exist", param="trigger_id")
