"""Calls: each thing that can be asked of the server, as a value, without doing it.

Sent by the transports of both clients. Invariant: a call that could do something twice carries an
idempotency key of its own, so that a transport may repeat every call that is `repeatable`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter

from millpond.client.models import Event, Flow, InputRequest, Page, Queue, RunData

T = TypeVar("T")
Id = str | uuid.UUID


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request; `read` makes the result of the decoded JSON that answers it."""

    method: str
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    content: bytes | None = None
    idempotency_key: str | None = None
    is_repeatable: bool = True


def reader(kind: Any) -> Callable[[Any], Any]:
    """Return what validates decoded JSON as a type."""
    return TypeAdapter(kind).validate_python


_run = reader(RunData)


def _get(path: str, kind: Any, **params: Any) -> Call[Any]:
    return Call(method="GET", path=path, read=reader(kind), params=given(params))


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None, so that the server's own default holds."""
    return {name: value for name, value in values.items() if value is not None}


def start_run(
    flow: str,
    input: Any = None,
    *,
    version: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    delay_s: float | None = None,
    deadline_s: float | None = None,
    labels: Mapping[str, str] | None = None,
    dedup_key: str | None = None,
    on_duplicate: Literal["reject", "join", "cancel_old"] | None = None,
    idempotency_key: str | None = None,
) -> Call[RunData]:
    """Start a run of a flow; it is durable when this returns.

    `delay_s` and `deadline_s` count from now, in seconds. Without an `idempotency_key` each call gets
    one of its own, so that a repeat after a broken connection starts nothing twice.
    """
    body = given(
        {
            "version": version,
            "queue": queue,
            "priority": priority,
            "delay_s": delay_s,
            "deadline_s": deadline_s,
            "labels": None if labels is None else dict(labels),
            "dedup_key": dedup_key,
            "on_duplicate": on_duplicate,
        }
    )
    return Call(
        method="POST",
        path="/v1/runs",
        read=_run,
        body={"flow": flow, "input": {} if input is None else input, **body},
        idempotency_key=idempotency_key or new_key(),
    )


def get_run(run_id: Id) -> Call[RunData]:
    """Return a run with its steps and open questions."""
    return Call(method="GET", path=f"/v1/runs/{run_id}", read=_run)


def list_runs(
    *,
    state: str | Sequence[str] | None = None,
    flow: str | None = None,
    queue: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    q: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
) -> Call[Page[RunData]]:
    """Return one page of runs, newest first."""
    return _get(
        "/v1/runs",
        Page[RunData],
        state=state,
        flow=flow,
        queue=queue,
        created_after=_time(created_after),
        created_before=_time(created_before),
        q=q,
        limit=limit,
        after=_text(after),
    )


def list_events(run_id: Id, *, after: int = 0, limit: int = 100) -> Call[Page[Event]]:
    """Return events of a run numbered above `after`."""
    return _get(f"/v1/runs/{run_id}/events", Page[Event], after=after, limit=limit)


def cancel_run(run_id: Id, *, reason: str = "") -> Call[RunData]:
    """Stop a run: at once when nothing executes it, else as soon as its worker has let go."""
    return Call(method="POST", path=f"/v1/runs/{run_id}/cancel", read=_run, body={"reason": reason})


def list_input_requests(
    *,
    state: str | None = None,
    role: str | None = None,
    run_id: Id | None = None,
    limit: int | None = None,
    after: Id | None = None,
) -> Call[Page[InputRequest]]:
    """Return one page of questions to humans, newest first."""
    return _get(
        "/v1/input-requests",
        Page[InputRequest],
        state=state,
        role=role,
        run_id=_text(run_id),
        limit=limit,
        after=_text(after),
    )


def get_input_request(request_id: Id) -> Call[InputRequest]:
    """Return one question."""
    return _get(f"/v1/input-requests/{request_id}", InputRequest)


def resolve_input_request(
    request_id: Id, answer: Any, *, digest: str | None = None
) -> Call[InputRequest]:
    """Decide a question, once; give the `digest` that was shown to approve nothing else."""
    return Call(
        method="POST",
        path=f"/v1/input-requests/{request_id}/resolve",
        read=reader(InputRequest),
        body=given({"answer": answer, "digest": digest}) if digest else {"answer": answer},
        is_repeatable=False,
    )


def list_flows() -> Call[Page[Flow]]:
    """Return all flows by name."""
    return _get("/v1/flows", Page[Flow])


def get_flow(name: str) -> Call[Flow]:
    """Return one flow with the schema of its input."""
    return _get(f"/v1/flows/{name}", Flow)


def list_queues() -> Call[Page[Queue]]:
    """Return queues by name, with the org's own work in each."""
    return _get("/v1/queues", Page[Queue])


def next_page(call: Call[Page[T]], page: Page[T]) -> Call[Page[T]]:
    """Return the call for the page after this one."""
    return replace(call, params={**call.params, "after": page.last_id})


def new_key() -> str:
    """Make an idempotency key."""
    return uuid.uuid4().hex


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _text(value: Id | None) -> str | None:
    return None if value is None else str(value)
