"""Calls about runs: start, look, tell, stop, repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Required, TypedDict

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    given,
    id_text,
    many,
    path_of,
    post,
    post_once,
    reader,
    set_of,
    time_text,
)
from millpond.client.models import Event, OrgEvent, Page, RunBatch, RunData, Signal
from millpond.client.models_control import Why

OnDuplicate = Literal["reject", "join", "cancel_old"]
Urgency = Literal["standard", "interactive"]


class RunWish(TypedDict, total=False):
    """One of many runs to start: what `start` takes, as a dictionary."""

    flow: Required[str]
    input: Any
    version: int | None
    queue: str | None
    priority: int
    urgency: Urgency
    delay_s: float
    deadline_s: float | None
    labels: dict[str, str]
    dedup_key: str | None
    on_duplicate: OnDuplicate
    keys: list[str]
    tokens: int | None


def start_run(
    flow: str,
    input: Any = UNSET,
    *,
    version: int | None = None,
    queue: str | None = None,
    priority: int | None = None,
    urgency: Urgency | None = None,
    delay_s: float | None = None,
    deadline_s: float | None = None,
    labels: Mapping[str, str] | None = None,
    dedup_key: str | None = None,
    on_duplicate: OnDuplicate | None = None,
    keys: Sequence[str] | None = None,
    tokens: int | None = None,
    idempotency_key: str | None = None,
) -> Call[RunData]:
    """Start a run of a flow; it is durable when this returns.

    `delay_s` and `deadline_s` count from now, in seconds. Of the runs with a `dedup_key` one is live at
    a time; `on_duplicate` says what happens when one is. `urgency` may be "standard" where nobody waits for it,
    though the flow is interactive. `keys`, such as `provider:openai`, are what it counts on under limits, beside the
    flow's own; `tokens` is about how many it uses, where these are limited. Without an `idempotency_key` each call gets
    one of its own, so that a repeat after a broken connection starts nothing twice.
    """
    body = given(
        {
            "flow": flow,
            "version": version,
            "queue": queue,
            "priority": priority,
            "urgency": urgency,
            "delay_s": delay_s,
            "deadline_s": deadline_s,
            "labels": labels,
            "dedup_key": dedup_key,
            "on_duplicate": on_duplicate,
            "keys": None if keys is None else list(keys),
            "tokens": tokens,
        }
    )
    body |= set_of({"input": input})
    return post_once(path_of("runs"), RunData, body, key=idempotency_key)


def start_runs(runs: Sequence[RunWish], *, idempotency_key: str | None = None) -> Call[RunBatch]:
    """Start up to 1,000 runs, all or none; the answer has their ids in the order of the wishes."""
    body = {"runs": list(runs)}
    return post_once(path_of("runs", "batch"), RunBatch, body, key=idempotency_key)


def get_run(run_id: Id) -> Call[RunData]:
    """Return a run with its steps and open questions."""
    return get(path_of("runs", run_id), RunData)


def list_runs(
    *,
    state: str | Sequence[str] | None = None,
    flow: str | None = None,
    queue: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    q: str | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[RunData]]:
    """Runs that fit, newest first; `limit` is the size of a page."""
    return get(
        path_of("runs"),
        Page[RunData],
        state=many(state),
        flow=flow,
        queue=queue,
        created_after=time_text(created_after),
        created_before=time_text(created_before),
        q=q,
        label=[f"{name}={value}" for name, value in (labels or {}).items()] or None,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def list_run_events(run_id: Id, *, after: int = 0, limit: int = 100) -> Call[Page[Event]]:
    """Stored events of a run numbered above `after`."""
    return get(path_of("runs", run_id, "events"), Page[Event], after=after, limit=limit)


def list_org_events(
    *,
    after: str | None = None,
    kind: str | Sequence[str] | None = None,
    flow: str | None = None,
    limit: int | None = None,
) -> Call[Page[OrgEvent]]:
    """Events of all runs after a place, which `last_id` of a page is; `now` is the place after all of them."""
    return get(
        path_of("run-events"),
        Page[OrgEvent],
        after=after,
        kind=many(kind),
        flow=flow,
        limit=limit,
    )


def explain_run(run_id: Id) -> Call[Why]:
    """Return why a run does not run: every reason, and one line for people."""
    return get(path_of("runs", run_id, "why"), Why)


def signal_run(
    run_id: Id, name: str, data: Any = None, *, idempotency_key: str | None = None
) -> Call[Signal]:
    """Tell a run something; it is stored when this returns, and the run finds it when it waits."""
    body = {"name": name, "data": data}
    return post_once(path_of("runs", run_id, "signals"), Signal, body, key=idempotency_key)


def cancel_run(run_id: Id, reason: str = "", *, skip_endings: bool = False) -> Call[RunData]:
    """Stop a run: at once when nothing executes it, else as soon as its worker has let go.

    What it has to undo is undone first, but with `skip_endings`.
    """
    return Call(
        method="POST",
        path=path_of("runs", run_id, "cancel"),
        read=reader(RunData),
        body={"reason": reason, "skip_endings": skip_endings},
        is_same_twice=True,
    )


def rerun_run(
    run_id: Id,
    *,
    from_step: str | None = None,
    input: Any | Unset = UNSET,
    idempotency_key: str | None = None,
) -> Call[RunData]:
    """Start a run that repeats this one, from its start or, once it has ended, from a step on."""
    body = given({"from_step": from_step}) | set_of({"input": input})
    return post_once(path_of("runs", run_id, "rerun"), RunData, body, key=idempotency_key)


def release_run(
    run_id: Id, reason: str = "", *, idempotency_key: str | None = None
) -> Call[RunData]:
    """Let a run that failed as poison be tried again, alone, as a run that keeps what it recorded."""
    body = {"reason": reason}
    return post_once(path_of("runs", run_id, "release"), RunData, body, key=idempotency_key)


def resume_run(run_id: Id) -> Call[RunData]:
    """Queue a blocked run again, after code was deployed that its history matches."""
    return post(path_of("runs", run_id, "resume"), RunData)
