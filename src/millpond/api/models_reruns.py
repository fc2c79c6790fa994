"""Models of doing it again: reruns, releases, and actions on many runs.

Called by the routes of reruns. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.models import AcceptedRun, Run
from millpond.api.texts import LabelName, LabelValue, Reason, StepKey, Word
from millpond.types import RunState


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RerunRun(_Request):
    """A wish to repeat a run."""

    from_step: StepKey | None = Field(
        None,
        description="Key of the step from which on it runs again; what had ended before is kept. "
        "Unset: from the start.",
    )
    input: Any = Field(None, description="Another input. Left out: the same.")


class ReleaseRun(_Request):
    """A wish to try a poisoned run again."""

    reason: Reason = Field("", description="Why; kept in the run's events.")


class RunsFilter(_Request):
    """Which runs an action is for; all of its members have to fit. At least one is given."""

    states: list[Annotated[RunState, Field(strict=False)]] = Field(
        default_factory=list, description="Any of these; empty: all."
    )
    flow: Word | None = None
    queue: Word | None = None
    created_after: datetime | None = Field(None, strict=False, description="Made at or after.")
    created_before: datetime | None = Field(None, strict=False, description="Made before.")
    q: Word | None = Field(None, description="Part of flow or labels, or start of the id.")
    labels: dict[LabelName, LabelValue] = Field(
        default_factory=dict, max_length=16, description="Labels that the run has, all of them."
    )


class BulkAction(_Request):
    """A wish to do something to many runs."""

    action: Literal["cancel", "rerun"]
    filter: RunsFilter
    dry_run: bool = Field(default=False, description="Only tell how many runs it would be for.")
    reason: Reason = Field("", description="Why; kept in the events of cancelled runs.")
    skip_endings: bool = Field(
        default=False, description="As of a cancel: undo nothing, ask nothing. Not for reruns."
    )


class AcceptedRerun(AcceptedRun):
    """A repeat as accepted; its `version` is the one of the first run while workers have that."""

    rerun_of: uuid.UUID
    rerun_from: str | None


class BulkPreview(BaseModel):
    """How many runs an action would be for now, and the newest of them."""

    object: Literal["bulk_preview"]
    action: Literal["cancel", "rerun"]
    matched: int
    is_exact: bool = Field(description="False: there are more than so many.")
    examples: list[Run]
