"""Models of what starts by itself: schedules, triggers, the events that triggers listen for.

Called by their routes. Invariant: request models are strict and refuse fields that they do not know;
in a change, what is left out stays as it is.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.models import Run
from millpond.api.texts import LabelValue, LongWord, Name, OwnLabelName, Word
from millpond.engine.triggers import MAX_COUNT, MAX_PERIOD_S

Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
Priority = Annotated[int, Field(ge=-100, le=100)]
# Two more name what started the run.
Labels = Annotated[dict[OwnLabelName, LabelValue], Field(max_length=14)]
MissedPolicy = Literal["skip", "one", "all"]
OverlapPolicy = Literal["allow", "skip", "cancel_old"]
_LEFT_OUT: Any = None

_CRON = (
    "Five fields: minute, hour, day of the month, month, day of the week; or `@daily` and the like."
)
_ZONE = "A name of the IANA time zone database, such as `Europe/Berlin`."
_MISSED = (
    "What becomes of times that passed while nothing could start: `skip` drops them, `one` starts "
    "one run for all, `all` one for each, at most the newest 100."
)
_OVERLAP = (
    "While the schedule's last run is live: `allow` starts another, `skip` starts none, "
    "`cancel_old` cancels the last run for the new one."
)
_FLOW = "Name of the flow to start; it must not be internal."
_VERSION = "Unset: the newest that a live worker has, at each start."
_QUEUE = "A queue that workers serve. Unset: the flow's."


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CreateSchedule(_Wish):
    """A wish to run a flow at times of a calendar."""

    name: Name = Field(description="Unique in the org.")
    flow: Word = Field(description=_FLOW)
    cron: Word = Field(description=_CRON)
    time_zone: Word = Field("UTC", description=_ZONE)
    version: Version | None = Field(None, description=_VERSION)
    input: Any = Field(default_factory=dict, description="Must fit the flow's input schema.")
    queue: Word | None = Field(None, description=_QUEUE)
    priority: Priority = Field(0, description="Higher goes earlier.")
    labels: Labels = Field(default_factory=dict, description="Given to every run.")
    missed: MissedPolicy = Field("one", description=_MISSED)
    overlap: OverlapPolicy = Field("allow", description=_OVERLAP)
    is_paused: bool = Field(default=False, description="Make it, and start nothing yet.")


class ChangeSchedule(_Wish):
    """What to change of a schedule; members left out stay as they are."""

    name: Name = Field(_LEFT_OUT, description="Unique in the org.")
    flow: Word = Field(_LEFT_OUT, description=_FLOW)
    cron: Word = Field(_LEFT_OUT, description=_CRON)
    time_zone: Word = Field(_LEFT_OUT, description=_ZONE)
    version: Version | None = Field(_LEFT_OUT, description=_VERSION)
    input: Any = Field(_LEFT_OUT, description="Must fit the flow's input schema.")
    queue: Word | None = Field(_LEFT_OUT, description=_QUEUE)
    priority: Priority = Field(_LEFT_OUT, description="Higher goes earlier.")
    labels: Labels = Field(_LEFT_OUT, description="Given to every run; replaces all labels.")
    missed: MissedPolicy = Field(_LEFT_OUT, description=_MISSED)
    overlap: OverlapPolicy = Field(_LEFT_OUT, description=_OVERLAP)


class ScheduleOut(BaseModel):
    """A schedule, and how far it has come."""

    id: uuid.UUID
    object: Literal["schedule"]
    name: str
    flow: str
    version: int | None
    queue: str | None
    input: Any
    priority: int
    labels: dict[str, str]
    cron: str
    time_zone: str
    missed: MissedPolicy
    overlap: OverlapPolicy
    is_paused: bool
    next_due_at: datetime | None = Field(description="Null while paused.")
    last_due_at: datetime | None = Field(description="The newest time that was dealt with.")
    last_run_id: uuid.UUID | None
    last_error: str | None = Field(
        description="Why the last due time started nothing: a code, a colon, a sentence."
    )
    created_by: str
    created_at: datetime
    updated_at: datetime


class ScheduleDetail(ScheduleOut):
    """A schedule with its next times and its last run."""

    next_times: list[datetime] = Field(description="The next five, from now; none while paused.")
    last_run: Run | None = Field(
        description="As it stands now; null once it is pruned. Without `runs:read` it has no input, output, error, "
        "labels and keys."
    )


_EVENT = "Name of the events that it listens for."
_FILTER = (
    "A JSON schema that an event's data must satisfy: at most 16 KiB, without references, "
    "`unevaluatedProperties` and `unevaluatedItems`; patterns without lookaround."
)
_MODE = (
    "`each` starts a run per event; `debounce` one with the last event, once none came for "
    "`period_s`; `throttle` one at most per `period_s`, with the first event, and drops the others; "
    "`batch` one with up to `max_count` events, or with those that came in `max_wait_s`."
)
_GROUP_BY = "A path in the data, such as `customer.id`: each of its values is gathered for itself."
_PERIOD = "Seconds of quiet before a debounced run, or between throttled runs."
_MAX_WAIT = (
    "Seconds that the first event of a batch, or of a burst that is debounced, waits at most."
)
_MAX_COUNT = "How many events a batch has at most."
TriggerMode = Literal["each", "debounce", "throttle", "batch"]
Seconds = Annotated[float, Field(gt=0, le=MAX_PERIOD_S, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class CreateTrigger(_Wish):
    """A wish to start a flow when events of a name arrive."""

    name: Name = Field(description="Unique in the org.")
    event: Word = Field(description=_EVENT)
    flow: Word = Field(description=_FLOW)
    filter: Any = Field(None, description=_FILTER)
    version: Version | None = Field(None, description=_VERSION)
    queue: Word | None = Field(None, description=_QUEUE)
    priority: Priority = Field(0, description="Higher goes earlier.")
    labels: Labels = Field(default_factory=dict, description="Given to every run.")
    mode: TriggerMode = Field("each", description=_MODE)
    group_by: Word | None = Field(None, description=_GROUP_BY)
    period_s: Seconds | None = Field(None, description=_PERIOD)
    max_wait_s: Seconds | None = Field(None, description=_MAX_WAIT)
    max_count: Count | None = Field(None, description=_MAX_COUNT)
    is_paused: bool = Field(default=False, description="Make it, and take no events yet.")


class ChangeTrigger(_Wish):
    """What to change of a trigger; members left out stay as they are.

    How it gathers (`mode`, `group_by`) and what it listens for (`event`) stay: make another trigger.
    """

    name: Name = Field(_LEFT_OUT, description="Unique in the org.")
    flow: Word = Field(_LEFT_OUT, description=_FLOW)
    filter: Any = Field(_LEFT_OUT, description=_FILTER)
    version: Version | None = Field(_LEFT_OUT, description=_VERSION)
    queue: Word | None = Field(_LEFT_OUT, description=_QUEUE)
    priority: Priority = Field(_LEFT_OUT, description="Higher goes earlier.")
    labels: Labels = Field(_LEFT_OUT, description="Given to every run; replaces all labels.")
    period_s: Seconds | None = Field(_LEFT_OUT, description=_PERIOD)
    max_wait_s: Seconds | None = Field(_LEFT_OUT, description=_MAX_WAIT)
    max_count: Count | None = Field(_LEFT_OUT, description=_MAX_COUNT)


class TriggerOut(BaseModel):
    """A trigger."""

    id: uuid.UUID
    object: Literal["trigger"]
    name: str
    event: str
    flow: str
    filter: Any
    version: int | None
    queue: str | None
    priority: int
    labels: dict[str, str]
    mode: TriggerMode
    group_by: str | None
    period_s: float | None
    max_wait_s: float | None
    max_count: int | None
    is_paused: bool
    dropped: int = Field(
        description="Events that matched and got no run: throttled, overtaken, or refused by the flow."
    )
    last_error: str | None = Field(
        description="Why the last start failed: a code, a colon, a sentence."
    )
    created_by: str
    created_at: datetime
    updated_at: datetime


class WaitingOut(BaseModel):
    """What waits for a trigger; `dropped` is not yet in the trigger's own count."""

    groups: int
    events: int
    dropped: int


class TriggerDetail(TriggerOut):
    """A trigger with what waits for it."""

    waiting: WaitingOut


class SendEvent(_Wish):
    """An event for the triggers that listen for its name."""

    name: Word = Field(description="Such as `order.placed`.")
    data: Any = Field(None, description="Any JSON, at most 192 KiB.")
    id: LongWord | None = Field(
        None, description="Unique in the org: a repeat is answered as the first. Unset: made up."
    )


class SendEvents(_Wish):
    """Events that are received together or not at all, in their order."""

    events: list[SendEvent] = Field(min_length=1, max_length=1000)


class StartedRun(BaseModel):
    """A run that an event started."""

    run_id: uuid.UUID
    trigger: str


class InboundEventOut(BaseModel):
    """A received event; from a POST with the runs that it started at once, from a list with all."""

    id: str
    object: Literal["inbound_event"]
    name: str
    data: Any
    sent_by: str
    received_at: datetime
    runs: list[StartedRun]


class InboundEvents(BaseModel):
    """Received events, in the order in which they were sent."""

    data: list[InboundEventOut]
