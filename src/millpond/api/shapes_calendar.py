"""Shapes of schedules, triggers and received events, as clients see them.

Called by their routes. Invariant: what these functions write is what `models_calendar` describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from millpond.api.shapes import run_json
from millpond.engine.schedules import Schedule
from millpond.engine.views import RunView


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
    schedule: Schedule, next_times: Sequence[datetime], last_run: RunView | None
) -> dict[str, Any]:
    """Return a schedule with its next times and its last run."""
    return {
        **schedule_json(schedule),
        "next_times": list(next_times),
        "last_run": None if last_run is None else run_json(last_run),
    }
