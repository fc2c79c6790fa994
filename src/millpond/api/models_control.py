"""Models of what is controlled from outside: batches, pauses, reasons to wait, workers.

Called by the routes of these. Invariant: request models are strict and refuse fields that they do not
know.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.models import StartRun

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
