"""What the server answers, as typed objects.

Made by `calls` from JSON: runs, events and questions here, the rest in the other models. Invariant:
members that this version does not know are kept as extra attributes, so that a newer server breaks no
older client.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")

FINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
FINAL_KINDS = frozenset(f"run.{state}" for state in FINAL_STATES)


class Answer(BaseModel):
    """The base of every answer."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Step(Answer):
    """A recorded step of a run; `queue` is the other one in which it waits or is executed now."""

    key: str
    name: str
    kind: str
    state: str
    queue: str | None = None
    needs: dict[str, str] = Field(default_factory=dict)
    output: Any = None
    error: dict[str, Any] | None = None
    tries: int = 1
    started_at: datetime | None = None
    finished_at: datetime | None = None


class InputRequest(Answer):
    """A question to a human; `digest` is bound to what is to be approved."""

    id: uuid.UUID
    run_id: uuid.UUID
    step: str
    role: str
    title: str
    form: Any
    proposal: Any
    digest: str
    state: str
    kind: str = "question"
    expires_at: datetime | None = None
    created_at: datetime | None = None
    answer: Any = None
    resolved_by: str | None = None
    resolved_at: datetime | None = None


class RunData(Answer):
    """A run as the server told of it last; lists and starts tell less of it than `get`.

    `truncated` names what is None for its size in a list.
    `is_new` is told by what starts runs: False for a live run with the same `dedup_key` that was joined.
    """

    id: uuid.UUID
    flow: str
    version: int
    queue: str
    state: str
    priority: int = 0
    urgency: str = "standard"
    input: Any = None
    output: Any = None
    truncated: list[str] = Field(default_factory=list)
    error: dict[str, Any] | None = None
    subject: str | None = None
    attempts: int = 0
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    cancel_requested: bool = False
    is_new: bool | None = None
    blocked: dict[str, Any] | None = None
    deadline_at: datetime | None = None
    dedup_key: str | None = None
    rerun_of: uuid.UUID | None = None
    rerun_from: str | None = None
    reruns: list[uuid.UUID] = Field(default_factory=list)
    parent_id: uuid.UUID | None = None
    continued_from: uuid.UUID | None = None
    continued_to: uuid.UUID | None = None
    state_values: dict[str, Any] = Field(default_factory=dict)
    steps: list[Step] = Field(default_factory=list)
    input_requests: list[InputRequest] = Field(default_factory=list)

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self.state in FINAL_STATES


class Event(Answer):
    """A stored fact of a run; `id` is its number within the run."""

    run_id: uuid.UUID
    id: int
    kind: str
    step: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    at: datetime

    @property
    def is_final(self) -> bool:
        """Whether no event can follow."""
        return self.kind in FINAL_KINDS


class OrgEvent(Answer):
    """A stored fact of any run of the org; `id` is its place among those of all runs, `number` the one in its run."""

    id: str
    run_id: uuid.UUID
    flow: str
    number: int
    kind: str
    step: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    at: datetime


class Delta(Answer):
    """A piece of text that a step shows while it goes on; `n` counts within step, attempt and try."""

    run_id: uuid.UUID
    step: str
    attempt: int
    tries: int
    n: int
    text: str
    at: datetime


class Page(Answer, Generic[Item]):
    """One page of a list; `last_id` is where the next one goes on."""

    data: list[Item]
    has_more: bool = False
    first_id: str | int | None = None
    last_id: str | int | None = None


class RunBatch(Answer):
    """Runs as accepted together, in the order of the wishes; `joined` are places of live runs."""

    ids: list[uuid.UUID]
    joined: list[int] = Field(default_factory=list)


class BulkPreview(Answer):
    """How many runs an action would be for now, and the newest of them."""

    action: str
    matched: int
    is_exact: bool
    examples: list[RunData] = Field(default_factory=list)


class Signal(Answer):
    """A signal as it was stored for its run."""

    id: uuid.UUID
    run_id: uuid.UUID
    name: str
    sent_at: datetime
