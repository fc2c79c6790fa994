"""Batches: many runs accepted by one request.

Called by clients. Invariant: a 202 is sent only after the commit that holds all of them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response

from millpond.api.accept import IdempotencyKey, Traceparent, digest_of, promised
from millpond.api.auth import Caller, requires
from millpond.api.batch_start import MAX_BODY_BYTES, accept_batch
from millpond.api.bodies import described, read_json
from millpond.api.documented import BATCH_HEADERS, failures
from millpond.api.models_control import AcceptedBatch, BatchParts, StartBatch
from millpond.api.reply import reply

router = APIRouter(prefix="/v1/runs", tags=["runs"])

_ROUTE = "POST /v1/runs/batch"
Starter = Annotated[Caller, requires("runs:start")]


@router.post(
    "/batch",
    operation_id="start_run_batch",
    status_code=202,
    openapi_extra=described(StartBatch),
    responses={
        202: {"model": AcceptedBatch, "headers": BATCH_HEADERS},
        **failures(400, 401, 402, 403, 409, 413, 415, 422, 503),
    },
)
async def start_run_batch(
    request: Request,
    caller: Starter,
    key: IdempotencyKey = None,
    traceparent: Traceparent = None,
) -> Response:
    """Accept up to 1,000 runs, all or none.

    When one of them is not valid, `errors` names every bad one as `runs[3].input.x`. An
    Idempotency-Key stands for the whole batch.
    """
    wish = await read_json(request, BatchParts, max_bytes=MAX_BODY_BYTES)
    promise = promised(key, _ROUTE, lambda: digest_of(wish.runs))
    batch = await accept_batch(caller, wish.runs, promise, traceparent)
    headers = {"Retry-After": "1"}
    if batch.is_repeat:
        headers["Idempotency-Replayed"] = "true"
    return reply(batch.answer, status=202, headers=headers)
