"""Input requests: questions of runs to humans, and the humans' decisions.

Called by clients. Invariant: a question is decided once; of two people at the same time one wins and
the other is told so.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import InputRequest, Listing, ResolveRequest
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes import request_json
from millpond.api.texts import Word
from millpond.engine import questions, views

router = APIRouter(prefix="/v1/input-requests", tags=["input requests"])

Reader = Annotated[Caller, requires("inputs:read")]
Resolver = Annotated[Caller, requires("inputs:resolve")]
RequestState = Literal["pending", "resolved", "expired", "cancelled"]


@router.get(
    "",
    operation_id="list_input_requests",
    responses={200: {"model": Listing[InputRequest]}, **failures(401, 403, 422, 503)},
)
async def list_input_requests(
    caller: Reader,
    page: Paged,
    state: Annotated[RequestState | None, Query(description="Only this state.")] = None,
    role: Annotated[Word | None, Query(description="Only for this role.")] = None,
    run_id: Annotated[uuid.UUID | None, Query(description="Only of this run.")] = None,
) -> Response:
    """List questions to humans, newest first."""
    org_id = caller.org_id
    async with caller.org() as con:
        requests, has_more = await views.list_requests(
            con, org_id, page, state=state, role=role, run_id=run_id
        )
    return reply(listing([request_json(one) for one in requests], has_more=has_more))


@router.get(
    "/{request_id}",
    operation_id="get_input_request",
    responses={200: {"model": InputRequest}, **failures(401, 403, 404, 422, 503)},
)
async def get_input_request(caller: Reader, request_id: uuid.UUID) -> Response:
    """Show one question: its form, what is to be approved, and the decision once made."""
    async with caller.org() as con:
        return reply(request_json(await views.get_request(con, caller.org_id, request_id)))


@router.post(
    "/{request_id}/resolve",
    operation_id="resolve_input_request",
    openapi_extra=described(ResolveRequest),
    responses={
        200: {"model": InputRequest},
        **failures(400, 401, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def resolve_input_request(
    request: Request, caller: Resolver, request_id: uuid.UUID
) -> Response:
    """Decide a question; its run goes on.

    The caller needs the role that the question names. Give the `digest` that was shown, so that the
    decision holds for nothing else.
    """
    wish = await read_json(request, ResolveRequest)
    digest = None if wish.digest is None else bytes.fromhex(wish.digest)
    org_id = caller.org_id
    async with caller.org() as con:
        readied = await questions.resolve(
            con, org_id, request_id, caller.principal, wish.answer, digest
        )
        resolved = await views.get_request(con, org_id, request_id)
        await caller.tell(
            con,
            "input.resolved",
            f"input_request:{request_id}",
            details={"digest": resolved.digest.hex(), "answer_sha256": _digest(resolved.answer)},
            run_id=resolved.run_id,
        )
    if readied.queue:
        caller.ports.hints.wake([readied.queue])
    caller.ports.hints.changed([readied.run_id])
    return reply(request_json(resolved))


def _digest(answer: str | None) -> str:
    return hashlib.sha256((answer or "").encode()).hexdigest()
