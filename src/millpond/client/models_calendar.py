"""What the server answers about what starts by itself: schedules, triggers, received events.

Made by `calls` from JSON. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from pydantic import Field

from millpond.client.models import Answer, RunData


class Schedule(Answer):
    """A schedule; `get` tells its `next_times` and `last_run` too."""

    id: uuid.UUID
    name: str
    flow: str
    version: int | None = None
    queue: str | None = None
    input: Any = None
    priority: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    cron: str
    time_zone: str
    missed: str
    overlap: str
    is_paused: bool
    next_due_at: datetime | None = None
    last_due_at: datetime | None = None
    last_run_id: uuid.UUID | None = None
    last_error: str | None = None
    created_by: str
    created_at: datetime
    updated_at: datetime
    next_times: list[datetime] = Field(default_factory=list)
    last_run: RunData | None = None


class Waiting(Answer):
    """What waits for a trigger."""

    groups: int
    events: int
    dropped: int = 0


class Trigger(Answer):
    """A trigger; `get` tells what is `waiting` for it too."""

    id: uuid.UUID
    name: str
    event: str
    flow: str
    filter: Any = None
    version: int | None = None
    queue: str | None = None
    priority: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    mode: str
    group_by: str | None = None
    period_s: float | None = None
    max_wait_s: float | None = None
    max_count: int | None = None
    is_paused: bool
    dropped: int = 0
    last_error: str | None = None
    created_by: str
    created_at: datetime
    updated_at: datetime
    waiting: Waiting | None = None


class StartedRun(Answer):
    """A run that an event started."""

    run_id: uuid.UUID
    trigger: str


class InboundEvent(Answer):
    """A received event; as the answer to sending it, with the runs that it started at once."""

    id: str
    name: str
    data: Any = None
    sent_by: str
    received_at: datetime
    runs: list[StartedRun] = Field(default_factory=list)


class InboundEvents(Answer):
    """Received events, in the order in which they were sent."""

    data: list[InboundEvent]
