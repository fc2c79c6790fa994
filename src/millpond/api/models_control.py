"""Models of what is controlled from outside: batches, pauses, workers, reasons to wait.

Called by the routes of these. Invariant: request models are strict and refuse fields that they do not
know.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.models import StartRun
from millpond.api.texts import Reason
from millpond.types import RunState

MAX_BATCH = 1000


class StartBatch(BaseModel):
    """Wishes to run flows, accepted all or none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    runs: list[StartRun] = Field(min_length=1, max_length=MAX_BATCH)


class BatchParts(BaseModel):
    """A batch before each of its wishes is looked at, so that every bad one is named by its place."""

    model_config = ConfigDict(extra="forbid", strict=True)

    runs: Annotated[list[Any], Field(min_length=1, max_length=MAX_BATCH)]


class AcceptedBatch(BaseModel):
    """Runs as accepted, in the order of the wishes."""

    object: Literal["run_batch"]
    ids: list[uuid.UUID]
    joined: list[int] = Field(
        description="Places, from 0, of wishes that were answered by a live run with their key."
    )


class PauseWork(BaseModel):
    """A wish to pause."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Reason = Field("", description="Why; shown to whoever asks what waits.")


class PauseQueue(PauseWork):
    """A wish to pause a queue."""

    everyone: bool = Field(
        default=False, description="For every org; needs the permission `platform:operate` too."
    )


class ResumeQueue(BaseModel):
    """A wish to resume a queue."""

    model_config = ConfigDict(extra="forbid", strict=True)

    everyone: bool = Field(default=False, description="As when it was paused.")


class ResumedOut(BaseModel):
    """What a resume did."""

    object: Literal["resumed"]
    was_paused: bool
    queues: list[str] = Field(description="Queues in which work of the org can go on.")


class WhyReason(BaseModel):
    """One reason; further members depend on its kind."""

    model_config = ConfigDict(extra="allow")

    kind: Literal[
        "finished",
        "blocked",
        "scheduled",
        "paused",
        "no_worker",
        "limit",
        "cooldown",
        "breaker",
        "in_line",
        "running",
        "backoff",
        "sleep",
        "signal",
        "child",
        "input",
        "outcome",
        "other_queue",
        "room",
        "step",
    ]
    text: str
    reasons: list[WhyReason] | None = Field(
        None, description="Why the work item that it waits for does not run."
    )


class EstimateOut(BaseModel):
    """When a run can be expected to start, or to go on, and on what basis."""

    in_s: float | None = Field(description="In so many seconds; null where that is not known.")
    is_least: bool = Field(description="Not before that, and perhaps later.")
    basis: Literal[
        "free_slot",
        "pace",
        "slots",
        "limit",
        "timer",
        "running",
        "paused",
        "no_worker",
        "full",
        "human",
        "signal",
        "child",
        "blocked",
        "unknown",
    ] = Field(description="What it is reckoned from, or why it is not known.")
    text: str = Field(description="The same for people.")


class WhyOut(BaseModel):
    """Why a run does not run, or since when it does."""

    run_id: uuid.UUID
    object: Literal["why"]
    state: RunState
    text: str = Field(description="The reasons as one line.")
    deadline_at: datetime | None
    reasons: list[WhyReason]
    estimate: EstimateOut | None = Field(
        description="When it starts or goes on; null for a run that runs or is over."
    )


class SpillOut(BaseModel):
    """What is said of a worker's slots beyond their number."""

    helps: dict[str, list[str]] = Field(
        description="Which other queues the idle slots of a queue help, in order."
    )
    keep: dict[str, int] = Field(description="Slots that stay free when a queue helps others.")
    reserve: dict[str, int] = Field(
        description="The last free slots of a queue, only for organizations not above their share."
    )


class WorkerOut(BaseModel):
    """A live worker process."""

    id: uuid.UUID
    object: Literal["worker"]
    host: str
    pid: int
    release: str = Field(description="Its version of Millpond.")
    queues: dict[str, int] = Field(
        description="Slots by queue; 0 for one that only idle slots of others help."
    )
    in_use: dict[str, int] = Field(description="Slots in use by queue, a second old at most.")
    spill: SpillOut
    labels: dict[str, str]
    flows: list[str] = Field(description="The flow versions that it has, as `name@version`.")
    started_at: datetime
    heartbeat_age_s: float
    is_draining: bool
