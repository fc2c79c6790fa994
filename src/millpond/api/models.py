"""Models: request bodies as they are validated, and every JSON shape as OpenAPI describes it.

Called by the routes. Invariant: request models are strict and refuse fields that they do not know.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.texts import LabelValue, LongWord, OwnLabelName, Reason, Word
from millpond.engine.tokens import MOST_TOKENS
from millpond.types import RunState, Urgency

MAX_DELAY_S = 366 * 86_400
_Item = TypeVar("_Item")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StartRun(_Request):
    """A wish to run a flow."""

    flow: Word = Field(description="Name of the flow; `GET /v1/flows` lists them.")
    version: int | None = Field(None, ge=1, le=2**31 - 1, description="Unset: the newest.")
    input: Any = Field(default_factory=dict, description="Must fit the flow's input schema.")
    queue: Word | None = Field(None, description="A queue that workers serve. Unset: the flow's.")
    priority: int = Field(0, ge=-100, le=100, description="Higher goes earlier.")
    urgency: Urgency | None = Field(
        None, description="Unset: the flow's. `standard` where nobody waits for this run."
    )
    delay_s: float = Field(
        0.0, ge=0, le=MAX_DELAY_S, allow_inf_nan=False, description="Seconds until it may start."
    )
    labels: dict[OwnLabelName, LabelValue] = Field(
        default_factory=dict, max_length=16, description="Small texts to find the run by."
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DELAY_S,
        allow_inf_nan=False,
        description="Seconds until the run must be over, or it fails. Unset: the flow's.",
    )
    dedup_key: LongWord | None = Field(
        None, description="Of the org's runs with this key, one is live at a time."
    )
    keys: list[Word] = Field(
        default_factory=list,
        max_length=16,
        description="What it counts on under limits beside the flow's own, such as `provider:openai`.",
    )
    tokens: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="About how many tokens of models it uses, which limits on tokens reserve. Unset: the flow's.",
    )
    on_duplicate: Literal["reject", "join", "cancel_old"] = Field(
        "reject",
        description="When a run with the key is live: refuse (409), answer with that run, or cancel "
        "it and let the new one have the key (needs `runs:cancel` too).",
    )


class CancelRun(_Request):
    """A wish to stop a run."""

    reason: Reason = Field("", description="Why; kept in the run's events.")
    skip_endings: bool = Field(
        default=False,
        description="End it at once where nothing executes it: undo nothing, ask nothing.",
    )


class ResolveRequest(_Request):
    """A human's decision."""

    answer: Any = Field(description="Must fit the form of the input request.")
    digest: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="The `digest` that was shown: refused (409) when something else is asked now.",
    )


class SearchQuestion(_Request):
    """A question to a knowledge base."""

    query: str = Field(
        min_length=1, max_length=2000, pattern=r"^[^\x00]*$", description="What to look for."
    )
    limit: int = Field(5, ge=1, le=50, description="How many passages at most.")


class AcceptedRun(BaseModel):
    """A run as accepted: stored durably, not begun, unless it is a live one that was joined."""

    id: uuid.UUID
    object: Literal["run"]
    flow: str
    version: int
    queue: str
    state: Literal["queued", "scheduled", "running", "waiting", "awaiting_input"]
    priority: int
    labels: dict[str, str]
    is_new: bool = Field(description="False for a live run with the same deduplication key.")


class Run(BaseModel):
    """A run as it stands now."""

    id: uuid.UUID
    object: Literal["run"]
    flow: str
    version: int
    queue: str
    state: RunState
    priority: int
    urgency: Urgency = Field(description="`interactive` goes before `standard`, up to a bound.")
    input: Any
    output: Any = Field(description="The flow's result, once succeeded.")
    error: dict[str, Any] | None = Field(description="`class`, `code` and `message`, once failed.")
    subject: str = Field(description="Who started it.")
    attempts: int = Field(description="How many times a worker took it up.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    labels: dict[str, str]
    cancel_requested: bool
    rerun_of: uuid.UUID | None = Field(description="The run that this one repeats.")
    rerun_from: str | None = Field(description="The step from which on it does, if not the start.")
    blocked: dict[str, Any] | None = Field(
        description="Why it stands still until it is resumed: `recorded` against `asked`."
    )
    deadline_at: datetime | None = Field(description="By when it has to be over.")
    dedup_key: str | None = Field(description="While it is live, no other run with this key is.")
    truncated: list[Literal["input", "output"]] = Field(
        description="What is null here for its size, in lists above 2 KiB; the run itself shows it."
    )


class Step(BaseModel):
    """A recorded step."""

    key: str = Field(description="Branch path, name and occurrence: unique within the run.")
    name: str
    kind: Literal[
        "step",
        "sleep",
        "input",
        "emit",
        "value",
        "state",
        "child",
        "join",
        "signal",
        "ending",
        "secret",
    ]
    state: Literal["done", "failed", "waiting", "retrying", "begun", "unknown"]
    output: Any
    error: dict[str, Any] | None
    tries: int
    started_at: datetime = Field(description="When it began, or was queued in another queue.")
    finished_at: datetime | None
    queue: str | None = Field(description="The other queue in which it waits or is executed now.")


class InputRequest(BaseModel):
    """A question to a human, bound to a run, a step and the digest of what is approved."""

    id: uuid.UUID
    object: Literal["input_request"]
    run_id: uuid.UUID
    step: str
    role: str = Field(description="The role that may decide.")
    title: str
    form: Any = Field(description="JSON schema of the answer.")
    proposal: Any = Field(description="What is to be approved.")
    digest: str
    state: Literal["pending", "resolved", "expired", "cancelled"]
    kind: Literal["question", "outcome"] = Field(
        description="`outcome`: what became of a step that must not be repeated."
    )
    expires_at: datetime | None
    created_at: datetime
    answer: Any
    resolved_by: str | None
    resolved_at: datetime | None


class RunDetail(Run):
    """A run with its recorded steps, its open questions, its kin, and what its flow shows."""

    reruns: list[uuid.UUID] = Field(description="Runs that repeat this one, newest first.")
    steps: list[Step]
    input_requests: list[InputRequest]
    state_values: dict[str, Any] = Field(description="What the flow set last, by name.")
    parent_id: uuid.UUID | None = Field(description="The run that started this one as a child.")
    continued_from: uuid.UUID | None = Field(description="The run that this one goes on from.")
    continued_to: uuid.UUID | None = Field(description="The run that goes on from this one.")


class EventOut(BaseModel):
    """A stored fact of a run; on a stream, `id:` is its number and `event:` its kind."""

    run_id: uuid.UUID
    id: int = Field(description="Number within the run, from 1 without gaps.")
    object: Literal["event"]
    kind: str
    step: str | None
    data: dict[str, Any]
    at: datetime


class RunEventOut(BaseModel):
    """A stored fact of any run of the org; on a stream, `id:` is its place and `event:` its kind."""

    id: str = Field(description="Its place among the events of all runs: a cursor.")
    object: Literal["run_event"]
    run_id: uuid.UUID
    flow: str
    number: int = Field(description="Number within the run, from 1 without gaps.")
    kind: str
    step: str | None
    data: dict[str, Any]
    at: datetime


class PauseOut(BaseModel):
    """A pause that holds."""

    id: str
    object: Literal["pause"]
    scope: Literal["queue", "flow", "org", "everyone"] = Field(
        description="What is held: a queue, a flow, all work of the org; a queue for everyone."
    )
    queue: str | None
    flow: str | None
    paused_by: str = Field(description="`operator` for everyone, but to operators.")
    reason: str
    paused_at: datetime


class FlowOut(BaseModel):
    """A flow as its newest version has it."""

    id: str
    object: Literal["flow"]
    name: str
    version: int
    versions: list[int]
    queue: str
    permission: str | None = Field(description="What starting it needs; null is internal.")
    may_start: bool = Field(description="Whether the caller may start it.")
    is_served: bool = Field(description="Whether a live worker has this version.")
    description: str
    input_schema: Any
    output_schema: Any
    timeout_s: float | None
    deadline_s: float | None = Field(description="By when its runs are over, unless they say.")
    needs: dict[str, str] = Field(description="Labels that a worker must have to run it.")
    keys: list[str] = Field(description="What its runs count on under limits.")
    urgency: Urgency = Field(description="The class of its runs, where they do not say standard.")
    tokens: int | None = Field(
        description="How many tokens one of them reserves of limits on tokens; unset: as many as they were seen to use."
    )
    published_at: datetime
    pauses: list[PauseOut] = Field(description="What holds its runs in its own queue.")


class QueueOut(BaseModel):
    """A queue as the caller's org sees it; `workers` and `slots` are those of all live workers."""

    id: str
    object: Literal["queue"]
    name: str
    queued: int = Field(description="Work items that stand in line; counted up to 10,000.")
    is_depth_exact: bool = Field(description="False: more than `queued` stand in line.")
    oldest_s: float | None = Field(description="Age of the oldest of them, in seconds.")
    running: int
    scheduled: int
    waiting: int
    awaiting_input: int
    is_rest_exact: bool = Field(
        description="False: of more than 20,000 live runs, at least so many are scheduled or wait."
    )
    workers: int
    slots: int
    pauses: list[PauseOut] = Field(description="What holds all of the org's work in it.")


class KnowledgeBaseOut(BaseModel):
    """A knowledge base."""

    id: uuid.UUID
    object: Literal["knowledge_base"]
    name: str
    embedder: str = Field(description="Where its vectors come from.")
    documents: int
    created_at: datetime


class DocumentOut(BaseModel):
    """A document: its newest upload, and how far its ingestion is."""

    id: uuid.UUID
    object: Literal["document"]
    filename: str
    title: str
    media_type: str
    size_bytes: int
    digest: str = Field(description="SHA-256 of the bytes.")
    version: int
    ready_version: int | None = Field(description="The version that searches see, if any.")
    state: Literal["pending", "processing", "ready", "failed"]
    stage: Literal["parse", "chunk", "embed", "index"] | None
    progress: float = Field(description="From 0 to 1.")
    reason: str | None = Field(description="Why it failed.")
    chunks: int | None
    run_id: uuid.UUID | None = Field(description="The run that ingests it.")
    created_at: datetime
    updated_at: datetime


class PassageOut(BaseModel):
    """A cited passage: `text` is characters [start, end) of that version of the document."""

    object: Literal["passage"]
    document_id: uuid.UUID
    title: str
    filename: str
    version: int
    ordinal: int
    start: int
    end: int
    page: int | None
    text: str
    score: float
    vector_score: float
    text_score: float


class SearchOut(BaseModel):
    """What a question found, best first; empty when nothing reaches `min_score`."""

    object: Literal["search_result"]
    query: str
    data: list[PassageOut]
    min_score: float
    best_score: float | None


class Listing(BaseModel, Generic[_Item]):
    """One page of a list, newest first; events and names come in their own order."""

    data: list[_Item]
    has_more: bool = Field(description="Whether more follow in this direction.")
    first_id: str | int | None = Field(description="Give as `before` to go back.")
    last_id: str | int | None = Field(description="Give as `after` to go on.")


class Status(BaseModel):
    """Whether this process serves."""

    status: Literal["ok"]


class KeySet(BaseModel):
    """A JSON Web Key Set (RFC 7517)."""

    keys: list[dict[str, str]]


class ProblemError(BaseModel):
    """The problem as clients of OpenAI's API read it."""

    message: str
    type: str
    code: str
    param: str | None


class FieldFault(BaseModel):
    """One field at fault."""

    param: str | None
    code: str
    message: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    error: ProblemError
    advice: str | None = None
    errors: list[FieldFault] | None = None
    run_id: uuid.UUID | None = Field(None, description="The live run, of `duplicate_run`.")
    quota: str | None = Field(None, description="Which quota is used up, of `quota_exceeded`.")
    used: int | None = Field(None, description="How much of it is used.")
    maximum: int | None = Field(None, description="How much there is.")
    feature: str | None = Field(
        None, description="Which feature the organization's plan has not, of `feature_off`."
    )
    renews_at: datetime | None = Field(
        None, description="When its next period begins; absent for what stands until it is deleted."
    )
