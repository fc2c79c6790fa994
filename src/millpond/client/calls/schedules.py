"""Calls about schedules: runs that start by the clock."""

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
    post_once,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page, RunData
from millpond.client.models_calendar import Schedule

MissedPolicy = Literal["skip", "one", "all"]
OverlapPolicy = Literal["allow", "skip", "cancel_old"]
_ROOT = "schedules"


def list_schedules(
    *,
    name: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Schedule]]:
    """The org's schedules, newest first."""
    return get(
        path_of(_ROOT),
        Page[Schedule],
        name=name,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_schedule(
    name: str,
    flow: str,
    cron: str,
    *,
    input: Any = UNSET,
    time_zone: str | None = None,
    version: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    labels: Mapping[str, str] | None = None,
    missed: MissedPolicy | None = None,
    overlap: OverlapPolicy | None = None,
    is_paused: bool = False,
) -> Call[Schedule]:
    """Make a schedule; its name is unique in the org."""
    body = given(
        {
            "name": name,
            "flow": flow,
            "cron": cron,
            "time_zone": time_zone,
            "version": version,
            "queue": queue,
            "priority": priority,
            "labels": labels,
            "missed": missed,
            "overlap": overlap,
            "is_paused": is_paused,
        }
    )
    body |= set_of({"input": input})
    return post(path_of(_ROOT), Schedule, body)


def get_schedule(schedule_id: Id) -> Call[Schedule]:
    """Return a schedule with its next five times and its last run."""
    return get(path_of(_ROOT, schedule_id), Schedule)


def change_schedule(
    schedule_id: Id,
    *,
    name: str | Unset = UNSET,
    flow: str | Unset = UNSET,
    cron: str | Unset = UNSET,
    time_zone: str | Unset = UNSET,
    version: int | Unset | None = UNSET,
    input: Any | Unset = UNSET,
    queue: str | Unset | None = UNSET,
    priority: int | Unset = UNSET,
    labels: Mapping[str, str] | Unset = UNSET,
    missed: MissedPolicy | Unset = UNSET,
    overlap: OverlapPolicy | Unset = UNSET,
) -> Call[Schedule]:
    """Change what is given; a new expression or time zone counts from now."""
    body = set_of(
        {
            "name": name,
            "flow": flow,
            "cron": cron,
            "time_zone": time_zone,
            "version": version,
            "input": input,
            "queue": queue,
            "priority": priority,
            "labels": labels,
            "missed": missed,
            "overlap": overlap,
        }
    )
    return Call(method="PATCH", path=path_of(_ROOT, schedule_id), read=reader(Schedule), body=body)


def delete_schedule(schedule_id: Id) -> Call[None]:
    """Remove a schedule; its runs stay."""
    return Call(method="DELETE", path=path_of(_ROOT, schedule_id), read=read_nothing)


def pause_schedule(schedule_id: Id) -> Call[Schedule]:
    """Let a schedule start nothing until it is resumed."""
    return post(path_of(_ROOT, schedule_id, "pause"), Schedule)


def resume_schedule(schedule_id: Id) -> Call[Schedule]:
    """Let a schedule go on from now; what fell into the pause is not made up for."""
    return post(path_of(_ROOT, schedule_id, "resume"), Schedule)


def run_schedule_now(schedule_id: Id, *, idempotency_key: str | None = None) -> Call[RunData]:
    """Start a schedule's flow now, as the caller, besides its times and whether paused or not."""
    return post_once(path_of(_ROOT, schedule_id, "run_now"), RunData, key=idempotency_key)
