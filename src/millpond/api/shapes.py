"""Shapes: views as the JSON that clients see.

Called by the routes and the event stream. Invariant: what these functions write is what the models
in `models` describe; a test validates real responses against the published OpenAPI document.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from millpond.api.reply import raw
from millpond.engine.events import Event
from millpond.engine.feeds import OrgEvent
from millpond.engine.growing import Delta
from millpond.engine.queues import QueueView
from millpond.engine.tokens import need_of, without_need
from millpond.engine.views import FlowView, Kin, RequestView, RunView, StepView
from millpond.knowledge.records import BaseSummary, Document, SearchResult
from millpond.types import Principal


def run_json(run: RunView) -> dict[str, Any]:
    """Return a run as it stands in lists."""
    return {
        "id": run.run_id,
        "object": "run",
        "flow": run.flow,
        "version": run.version,
        "queue": run.queue,
        "state": run.state,
        "priority": run.priority,
        "urgency": run.urgency,
        "input": raw(run.input),
        "output": raw(run.output),
        "error": raw(run.error),
        "subject": run.subject,
        "attempts": run.attempts,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "labels": raw(run.labels),
        "cancel_requested": run.cancel_requested,
        "rerun_of": run.rerun_of,
        "rerun_from": run.rerun_from,
        "blocked": raw(run.blocked),
        "deadline_at": run.deadline_at,
        "dedup_key": run.dedup_key,
        "truncated": run.truncated,
    }


def run_for(principal: Principal, run: RunView) -> dict[str, Any]:
    """Return a run to who acted on it: without `runs:read`, where it stands and not what it is about."""
    shown = run_json(run)
    if not principal.may("runs:read"):
        shown |= dict.fromkeys(("input", "output", "error", "blocked", "dedup_key"))
        shown |= {"labels": {}, "truncated": []}
    return shown


def run_detail_json(
    run: RunView,
    steps: Sequence[StepView],
    requests: Sequence[RequestView],
    kin: Kin,
    state_values: Mapping[str, str],
    reruns: Sequence[uuid.UUID],
) -> dict[str, Any]:
    """Return a run with its steps, open questions, kin, repeats and what its flow shows."""
    return {
        **run_json(run),
        "reruns": reruns,
        "steps": [_step_json(step) for step in steps],
        "input_requests": [request_json(request) for request in requests],
        "state_values": {name: raw(value) for name, value in state_values.items()},
        "parent_id": kin.parent_id,
        "continued_from": kin.continued_from,
        "continued_to": kin.continued_to,
    }


def _step_json(step: StepView) -> dict[str, Any]:
    return {
        "key": step.step_key,
        "name": step.name,
        "kind": step.kind,
        "state": step.state,
        "output": raw(step.output),
        "error": raw(step.error),
        "tries": step.tries,
        "started_at": step.started_at,
        "finished_at": step.finished_at,
        "queue": step.queue,
    }


def event_json(event: Event) -> dict[str, Any]:
    """Return one event of a run."""
    return {
        "run_id": event.run_id,
        "id": event.event_no,
        "object": "event",
        "kind": event.kind,
        "step": event.step_key,
        "data": event.data,
        "at": event.at,
    }


def org_event_json(told: OrgEvent) -> dict[str, Any]:
    """Return one event of any run of the org; its id is its place among all of them."""
    event = told.event
    return {
        "id": str(told.place),
        "object": "run_event",
        "run_id": event.run_id,
        "flow": told.flow,
        "number": event.event_no,
        "kind": event.kind,
        "step": event.step_key,
        "data": event.data,
        "at": event.at,
    }


def delta_json(delta: Delta) -> dict[str, Any]:
    """Return a piece of the text of a step under way."""
    return {
        "run_id": delta.run_id,
        "object": "delta",
        "step": delta.step_key,
        "attempt": delta.attempt,
        "tries": delta.tries,
        "n": delta.n,
        "text": delta.text,
        "at": delta.at,
    }


def request_json(request: RequestView) -> dict[str, Any]:
    """Return a question to a human."""
    return {
        "id": request.request_id,
        "object": "input_request",
        "run_id": request.run_id,
        "step": request.step_key,
        "role": request.role,
        "title": request.title,
        "form": raw(request.form),
        "proposal": raw(request.proposal),
        "digest": request.digest,
        "state": request.state,
        "kind": request.kind,
        "expires_at": request.expires_at,
        "created_at": request.created_at,
        "answer": raw(request.answer),
        "resolved_by": request.resolved_by,
        "resolved_at": request.resolved_at,
    }


def flow_json(versions: Sequence[FlowView], *, may_start: bool) -> dict[str, Any]:
    """Return a flow as its newest version has it."""
    flow = versions[-1]
    return {
        "id": flow.name,
        "object": "flow",
        "name": flow.name,
        "version": flow.version,
        "versions": [version.version for version in versions],
        "queue": flow.queue,
        "permission": flow.permission,
        "may_start": may_start,
        "is_served": flow.is_served,
        "description": flow.description,
        "input_schema": flow.input_schema,
        "output_schema": flow.output_schema,
        "timeout_s": flow.timeout_s,
        "deadline_s": flow.deadline_s,
        "needs": flow.needs,
        "keys": without_need(flow.keys),
        "tokens": need_of(flow.keys),
        "urgency": flow.urgency,
        "published_at": flow.published_at,
    }


def queue_json(queue: QueueView) -> dict[str, Any]:
    """Return a queue as the caller's org sees it."""
    return {
        "id": queue.name,
        "object": "queue",
        "name": queue.name,
        "queued": queue.queued,
        "is_depth_exact": queue.is_depth_exact,
        "oldest_s": queue.oldest_s,
        "running": queue.running,
        "scheduled": queue.scheduled,
        "waiting": queue.waiting,
        "awaiting_input": queue.awaiting_input,
        "is_rest_exact": queue.is_rest_exact,
        "workers": queue.workers,
        "slots": queue.slots,
    }


def base_json(base: BaseSummary) -> dict[str, Any]:
    """Return a knowledge base."""
    return {"object": "knowledge_base", **base.model_dump()}


def document_json(document: Document) -> dict[str, Any]:
    """Return a document of a knowledge base."""
    fields = document.model_dump(exclude={"status"})
    return {"object": "document", **fields, "state": document.status}


def search_json(found: SearchResult) -> dict[str, Any]:
    """Return what a search found."""
    return {
        "object": "search_result",
        "query": found.query,
        "data": [{"object": "passage", **passage.model_dump()} for passage in found.passages],
        "min_score": found.min_score,
        "best_score": found.best_score,
    }
