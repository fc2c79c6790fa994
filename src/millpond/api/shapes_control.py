"""Shapes of what is controlled from outside: pauses, reasons to wait, workers.

Called by the routes. Invariant: what these functions write is what the models in `models_control`
describe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from millpond.engine.ordering import Estimate, shown
from millpond.engine.pauses import Pause
from millpond.engine.queues import WorkerView
from millpond.engine.why import Reason, Why
from millpond.types import Principal

OPERATE = "platform:operate"


def pause_json(pause: Pause, principal: Principal) -> dict[str, Any]:
    """Return a pause; who paused for everyone is shown to operators only."""
    scope = pause.scope
    named = scope.queue or scope.flow
    return {
        "id": f"{scope.kind}:{named}" if named else scope.kind,
        "object": "pause",
        "scope": scope.kind,
        "queue": scope.queue or None,
        "flow": scope.flow or None,
        "paused_by": pause.paused_by if principal.may(OPERATE) else pause.shown_by,
        "reason": pause.reason,
        "paused_at": pause.paused_at,
    }


def holding_json(
    pauses: Iterable[Pause], principal: Principal, *, queue: str = "", flow: str | None = None
) -> list[dict[str, Any]]:
    """Return the pauses that hold all work of a queue, or of a flow in it."""
    return [pause_json(one, principal) for one in pauses if one.holds(queue=queue, flow=flow)]


def why_json(why: Why) -> dict[str, Any]:
    """Return why a run stands where it stands."""
    return {
        "run_id": why.run_id,
        "object": "why",
        "state": why.state,
        "text": why.text,
        "deadline_at": why.deadline_at,
        "reasons": [_reason_json(reason) for reason in why.reasons],
        "estimate": None if why.estimate is None else _estimate_json(why.estimate),
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "in_s": None if estimate.in_s is None else round(estimate.in_s, 2),
        "is_least": estimate.is_least,
        "basis": estimate.basis,
        "text": shown(estimate),
    }


def _reason_json(reason: Reason) -> dict[str, Any]:
    shown = {"kind": reason.kind, "text": reason.text, **reason.facts}
    if reason.inner:
        shown["reasons"] = [_reason_json(inner) for inner in reason.inner]
    return shown


def worker_json(worker: WorkerView) -> dict[str, Any]:
    """Return a live worker."""
    return {
        "id": worker.worker_id,
        "object": "worker",
        "host": worker.host,
        "pid": worker.pid,
        "release": worker.release,
        "queues": dict(worker.queues),
        "in_use": dict(worker.in_use),
        "labels": worker.labels,
        "flows": worker.flows,
        "started_at": worker.started_at,
        "heartbeat_age_s": worker.heartbeat_age_s,
        "is_draining": worker.is_draining,
    }
