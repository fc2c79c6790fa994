"""Models of signals: the body that sends one, and a signal as it was stored.

Called by the signals' routes. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.engine.signals import NAME_PATTERN


class SendSignal(BaseModel):
    """Something to tell a run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(
        min_length=1,
        max_length=200,
        pattern=NAME_PATTERN,
        description="What the flow waits for by `ctx.wait_event(name)`.",
    )
    data: Any = Field(None, description="JSON, at most 256 KiB.")


class SignalOut(BaseModel):
    """A signal as stored: its run finds it, now or when it waits for it."""

    id: uuid.UUID
    object: Literal["signal"]
    run_id: uuid.UUID
    name: str
    sent_at: datetime
