"""Doing a run again: from the start, from a step on, or after quarantine.

Called by clients. Invariant: what ended stays as it ended; a repeat is a run of its own that names the
one it repeats, and is accepted as any other.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response

from millpond.api.accept import (
    Accepted,
    IdempotencyKey,
    Traceparent,
    accept_with,
    accepted_headers,
    accepted_json,
    digest_of,
    permit_start,
    promised,
    recall,
    wellformed,
)
from millpond.api.auth import Caller, requires
from millpond.api.batches import Promise
from millpond.api.bodies import described, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models_reruns import AcceptedRerun, ReleaseRun, RerunRun
from millpond.api.reply import reply
from millpond.db.pool import Connection
from millpond.engine import reruns
from millpond.engine.reruns import Repeat, Source
from millpond.engine.views import FlowView
from millpond.types import Intent

router = APIRouter(prefix="/v1/runs", tags=["runs"])

Starter = Annotated[Caller, requires("runs:start")]
Operator = Annotated[Caller, requires("runs:operate")]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"model": AcceptedRerun, "headers": ACCEPTED_HEADERS},
    **failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503),
}


@router.post(
    "/{run_id}/rerun",
    operation_id="rerun_run",
    status_code=202,
    openapi_extra=described(RerunRun, is_required=False),
    responses=dict(_RESPONSES),
)
async def rerun_run(
    request: Request,
    caller: Starter,
    run_id: uuid.UUID,
    key: IdempotencyKey = None,
    traceparent: Traceparent = None,
) -> Response:
    """Accept a run that repeats this one, from its start or, once it has ended, from a step on.

    It has the same flow, queue, labels and keys, and the same input or the one given, which is validated.
    The caller needs the flow's own permission besides `runs:start`.
    """
    wish = await read_json(request, RerunRun, is_optional=True)
    source = await _source(caller, run_id)
    flow = await _code(caller, source)
    permit_start(caller.principal, flow)
    asked = wish.model_dump(exclude_unset=True)
    promise = promised(key, f"POST /v1/runs/{run_id}/rerun", lambda: digest_of(asked))
    accepted = await _recalled(caller, source, promise)
    if accepted is None:
        input_text = source.input
        if "input" in wish.model_fields_set:
            input_text = orjson.dumps(wish.input).decode()
        if "input" in wish.model_fields_set or flow.version != source.version:
            caller.ports.catalog.check_input(flow, orjson.loads(input_text))
        repeat = Repeat(
            version=flow.version,
            timeout_s=flow.timeout_s,
            subject=caller.principal.subject,
            input=input_text,
            from_step=wish.from_step,
            backing=caller.principal.backing("runs:start", flow.permission),
            traceparent=wellformed(traceparent),
        )
        accepted = await _accept(caller, source, repeat, promise)
    return _reply(accepted, source, wish.from_step)


@router.post(
    "/{run_id}/release",
    operation_id="release_run",
    status_code=202,
    openapi_extra=described(ReleaseRun, is_required=False),
    responses=dict(_RESPONSES),
)
async def release_run(
    request: Request, caller: Operator, run_id: uuid.UUID, key: IdempotencyKey = None
) -> Response:
    """Let a run that was failed as poison be tried again, alone, from all that it recorded.

    The new run is of the same subject as the first one.
    """
    wish = await read_json(request, ReleaseRun, is_optional=True)
    source = await _source(caller, run_id)
    flow = await _code(caller, source)
    promise = promised(key, f"POST /v1/runs/{run_id}/release", lambda: digest_of(wish.model_dump()))
    if promise is not None:
        promise = replace(promise, subject=caller.principal.subject)
    accepted = await _recalled(caller, source, promise)
    if accepted is None:
        reruns.check_poison(source)
        repeat = Repeat(
            version=flow.version,
            timeout_s=flow.timeout_s,
            subject=source.subject,
            input=source.input,
            keeps_all=True,
            backing=source.backing,
        )
        accepted = await _accept(caller, source, repeat, promise, reason=wish.reason)
    return _reply(accepted, source, None)


async def _source(caller: Caller, run_id: uuid.UUID) -> Source:
    async with caller.org() as con:
        return await reruns.read(con, caller.org_id, run_id)


async def _code(caller: Caller, source: Source) -> FlowView:
    """Return the flow version that repeats a run."""
    return reruns.pick(await caller.ports.catalog.versions(source.flow), source.version)


async def _recalled(caller: Caller, source: Source, promise: Promise | None) -> Accepted | None:
    """Return what a key stands for: it needs no validation again."""
    if promise is None:
        return None
    return await recall(caller, promise, is_delayed=source.is_poison)


async def _accept(
    caller: Caller,
    source: Source,
    repeat: Repeat,
    promise: Promise | None,
    *,
    reason: str | None = None,
) -> Accepted:
    async def make(con: Connection) -> Intent:
        if repeat.from_step is not None:
            await reruns.check_step(con, source, repeat.from_step)
        intent = reruns.intent_of(source, repeat)
        await reruns.copy(con, source, repeat, intent.run_id)
        return intent

    async def follow(con: Connection, intent: Intent) -> None:
        await reruns.mark(con, source, intent)
        if repeat.keeps_all:
            await reruns.note_release(con, intent, caller.principal.subject, reason or "")
        await caller.tell(
            con,
            "run.released" if repeat.keeps_all else "rerun.accepted",
            f"run:{source.run_id}",
            details={
                "new_run": str(intent.run_id),
                "from_step": repeat.from_step,
                "reason": reason,
            },
            run_id=source.run_id,
        )

    return await accept_with(caller, make, promise, follow=follow, is_delayed=source.is_poison)


def _reply(accepted: Accepted, source: Source, from_step: str | None) -> Response:
    document = {**accepted_json(accepted), "rerun_of": source.run_id, "rerun_from": from_step}
    return reply(document, status=202, headers=accepted_headers(accepted))
