"""Shapes of schedules, triggers and received events, as clients see them.

Called by their routes. Invariant: what these functions write is what `models_calendar` describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from millpond.api.reply import raw
from millpond.api.shapes import run_for
from millpond.engine.inbound import Received
from millpond.engine.schedules import Schedule
from millpond.engine.triggers import Trigger, Waiting
from millpond.engine.views import RunView
from millpond.types import Principal


def schedule_json(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as it stands in lists."""
    draft = schedule.draft
    return {
        "id": schedule.schedule_id,
        "object": "schedule",
        "name": draft.name,
        "flow": draft.flow,
        "version": draft.version,
        "queue": draft.queue,
        "input": draft.input,
        "priority": draft.priority,
        "labels": dict(draft.labels),
        "cron": draft.cron,
        "time_zone": draft.time_zone,
        "missed": draft.missed,
        "overlap": draft.overlap,
        "is_paused": draft.is_paused,
        "next_due_at": schedule.next_due_at,
        "last_due_at": schedule.last_due_at,
        "last_run_id": schedule.last_run_id,
        "last_error": schedule.last_error,
        "created_by": schedule.created_by,
        "created_at": schedule.created_at,
        "updated_at": schedule.updated_at,
    }


def schedule_detail_json(
    schedule: Schedule,
    next_times: Sequence[datetime],
    last_run: RunView | None,
    principal: Principal,
) -> dict[str, Any]:
    """Return a schedule with its next times and its last run."""
    return {
        **schedule_json(schedule),
        "next_times": list(next_times),
        "last_run": None if last_run is None else run_for(principal, last_run),
    }


def trigger_json(trigger: Trigger) -> dict[str, Any]:
    """Return a trigger as it stands in lists."""
    draft = trigger.draft
    return {
        "id": trigger.trigger_id,
        "object": "trigger",
        "name": draft.name,
        "event": draft.event,
        "flow": draft.flow,
        "filter": draft.filter,
        "version": draft.version,
        "queue": draft.queue,
        "priority": draft.priority,
        "labels": dict(draft.labels),
        "mode": draft.mode,
        "group_by": draft.group_by,
        "period_s": draft.period_s,
        "max_wait_s": draft.max_wait_s,
        "max_count": draft.max_count,
        "is_paused": draft.is_paused,
        "dropped": trigger.dropped,
        "last_error": trigger.last_error,
        "created_by": trigger.created_by,
        "created_at": trigger.created_at,
        "updated_at": trigger.updated_at,
    }


def trigger_detail_json(trigger: Trigger, waiting: Waiting) -> dict[str, Any]:
    """Return a trigger with what waits for it."""
    held = {"groups": waiting.groups, "events": waiting.events, "dropped": waiting.dropped}
    return {**trigger_json(trigger), "waiting": held}


def inbound_json(event: Received, *, only_at_once: bool = False) -> dict[str, Any]:
    """Return a received event with its runs; an answer to its sender tells only of those at once."""
    return {
        "id": event.event_id,
        "object": "inbound_event",
        "name": event.name,
        "data": raw(event.data),
        "sent_by": event.sent_by,
        "received_at": event.received_at,
        "runs": [
            {"run_id": run["run_id"], "trigger": run["trigger"]}
            for run in event.runs
            if run["at_once"] or not only_at_once
        ],
    }
