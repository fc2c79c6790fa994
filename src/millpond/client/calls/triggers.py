"""Calls about triggers: runs that start when events arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    given,
    id_text,
    path_of,
    post,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page
from millpond.client.models_calendar import Trigger

TriggerMode = Literal["each", "debounce", "throttle", "batch"]
_ROOT = "triggers"


def list_triggers(
    *,
    name: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Trigger]]:
    """The org's triggers, newest first."""
    return get(
        path_of(_ROOT),
        Page[Trigger],
        name=name,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_trigger(
    name: str,
    event: str,
    flow: str,
    *,
    filter: Any = None,
    version: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    labels: Mapping[str, str] | None = None,
    mode: TriggerMode | None = None,
    group_by: str | None = None,
    period_s: float | None = None,
    max_wait_s: float | None = None,
    max_count: int | None = None,
    is_paused: bool = False,
) -> Call[Trigger]:
    """Make a trigger: events named `event` whose data fits the schema `filter` start the flow."""
    body = given(
        {
            "name": name,
            "event": event,
            "flow": flow,
            "filter": filter,
            "version": version,
            "queue": queue,
            "priority": priority,
            "labels": labels,
            "mode": mode,
            "group_by": group_by,
            "period_s": period_s,
            "max_wait_s": max_wait_s,
            "max_count": max_count,
            "is_paused": is_paused,
        }
    )
    return post(path_of(_ROOT), Trigger, body)


def get_trigger(trigger_id: Id) -> Call[Trigger]:
    """Return a trigger with what waits for it."""
    return get(path_of(_ROOT, trigger_id), Trigger)


def change_trigger(
    trigger_id: Id,
    *,
    name: str | Unset = UNSET,
    flow: str | Unset = UNSET,
    filter: Any | Unset = UNSET,
    version: int | Unset | None = UNSET,
    queue: str | Unset | None = UNSET,
    priority: int | Unset = UNSET,
    labels: Mapping[str, str] | Unset = UNSET,
    period_s: float | Unset | None = UNSET,
    max_wait_s: float | Unset | None = UNSET,
    max_count: int | Unset | None = UNSET,
) -> Call[Trigger]:
    """Change what is given; events that wait already keep the time that they were given."""
    body = set_of(
        {
            "name": name,
            "flow": flow,
            "filter": filter,
            "version": version,
            "queue": queue,
            "priority": priority,
            "labels": labels,
            "period_s": period_s,
            "max_wait_s": max_wait_s,
            "max_count": max_count,
        }
    )
    return Call(method="PATCH", path=path_of(_ROOT, trigger_id), read=reader(Trigger), body=body)


def delete_trigger(trigger_id: Id) -> Call[None]:
    """Remove a trigger with what waits for it; its runs stay."""
    return Call(method="DELETE", path=path_of(_ROOT, trigger_id), read=read_nothing)


def pause_trigger(trigger_id: Id) -> Call[Trigger]:
    """Let a trigger take no events and start nothing until it is resumed."""
    return post(path_of(_ROOT, trigger_id, "pause"), Trigger)


def resume_trigger(trigger_id: Id) -> Call[Trigger]:
    """Let a trigger take events again; what it held and is due starts now."""
    return post(path_of(_ROOT, trigger_id, "resume"), Trigger)
