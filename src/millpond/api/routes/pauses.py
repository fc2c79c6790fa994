"""Pauses: hold and let go a queue, a flow, or all work of an org.

Called by clients. Invariant: holding a queue for every org needs the operator's permission besides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Request, Response

from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing, PauseOut
from millpond.api.models_control import PauseQueue, PauseWork, ResumedOut, ResumeQueue
from millpond.api.reply import listing, reply
from millpond.api.shapes_control import OPERATE, pause_json
from millpond.api.texts import Word
from millpond.db.pool import Connection
from millpond.engine import pauses
from millpond.engine.pauses import Scope
from millpond.types import NO_ORG, Json

router = APIRouter(prefix="/v1", tags=["pauses"])

Reader = Annotated[Caller, requires("queues:read")]
QueueOperator = Annotated[Caller, requires("queues:operate")]
FlowOperator = Annotated[Caller, requires("flows:operate")]
OrgOperator = Annotated[Caller, requires("org:operate")]
_REFUSALS = (400, 401, 403, 413, 415, 422, 503)


@router.get(
    "/pauses",
    operation_id="list_pauses",
    responses={200: {"model": Listing[PauseOut]}, **failures(401, 403, 503)},
)
async def list_pauses(caller: Reader) -> Response:
    """List what is paused: by the org, and queues by the operator for everyone."""
    async with caller.org() as con:
        held = await pauses.list_pauses(con, caller.org_id)
    return reply(listing([pause_json(one, caller.principal) for one in held], has_more=False))


@router.post(
    "/queues/{name}/pause",
    operation_id="pause_queue",
    openapi_extra=described(PauseQueue, is_required=False),
    responses={200: {"model": PauseOut}, **failures(404, *_REFUSALS)},
)
async def pause_queue(request: Request, caller: QueueOperator, name: Word) -> Response:
    """Claim nothing more from a queue of the org, or with `everyone` of every org."""
    wish = await read_json(request, PauseQueue, is_optional=True)
    if wish.everyone:
        permit(caller.principal, OPERATE)
    return await _pause(caller, Scope(queue=name, is_for_everyone=wish.everyone), wish.reason)


@router.post(
    "/queues/{name}/resume",
    operation_id="resume_queue",
    openapi_extra=described(ResumeQueue, is_required=False),
    responses={200: {"model": ResumedOut}, **failures(*_REFUSALS)},
)
async def resume_queue(request: Request, caller: QueueOperator, name: Word) -> Response:
    """Let a paused queue go on."""
    wish = await read_json(request, ResumeQueue, is_optional=True)
    if wish.everyone:
        permit(caller.principal, OPERATE)
    return await _resume(caller, Scope(queue=name, is_for_everyone=wish.everyone))


@router.post(
    "/flows/{name}/pause",
    operation_id="pause_flow",
    openapi_extra=described(PauseWork, is_required=False),
    responses={200: {"model": PauseOut}, **failures(404, *_REFUSALS)},
)
async def pause_flow(request: Request, caller: FlowOperator, name: Word) -> Response:
    """Claim no more runs of a flow, in whatever queue and version."""
    wish = await read_json(request, PauseWork, is_optional=True)
    await caller.ports.catalog.flow(name)
    return await _pause(caller, Scope(flow=name), wish.reason)


@router.post(
    "/flows/{name}/resume",
    operation_id="resume_flow",
    responses={200: {"model": ResumedOut}, **failures(*_REFUSALS)},
)
async def resume_flow(caller: FlowOperator, name: Word) -> Response:
    """Let the runs of a paused flow go on."""
    return await _resume(caller, Scope(flow=name))


@router.post(
    "/org/pause",
    operation_id="pause_org",
    openapi_extra=described(PauseWork, is_required=False),
    responses={200: {"model": PauseOut}, **failures(*_REFUSALS)},
)
async def pause_org(request: Request, caller: OrgOperator) -> Response:
    """Claim no more work of the org; what runs goes on."""
    wish = await read_json(request, PauseWork, is_optional=True)
    return await _pause(caller, Scope(), wish.reason)


@router.post(
    "/org/resume",
    operation_id="resume_org",
    responses={200: {"model": ResumedOut}, **failures(*_REFUSALS)},
)
async def resume_org(caller: OrgOperator) -> Response:
    """Let the work of a paused org go on; pauses of its queues and flows stay."""
    return await _resume(caller, Scope())


async def _pause(caller: Caller, scope: Scope, reason: str) -> Response:
    principal = caller.principal
    async with caller.org() as con:
        held = await pauses.pause(con, caller.org_id, scope, principal.subject, reason)
        await _tell(caller, con, scope, "paused", {"reason": reason})
    return reply(pause_json(held, principal))


async def _tell(
    caller: Caller, con: Connection, scope: Scope, verb: str, details: dict[str, Json]
) -> None:
    """Tell the org, and the platform too of what holds for every org."""
    kind = "queue" if scope.queue else "flow" if scope.flow else "org"
    action, resource = f"{kind}.{verb}", f"{kind}:{scope.queue or scope.flow or caller.org_id}"
    told = {**details, "everyone": scope.is_for_everyone}
    await caller.tell(con, action, resource, details=told)
    if scope.is_for_everyone:
        of_platform = replace(caller, principal=replace(caller.principal, org_id=NO_ORG))
        await of_platform.tell(con, action, resource, details={**told, "org": caller.org_id})


async def _resume(caller: Caller, scope: Scope) -> Response:
    async with caller.org() as con:
        resumed = await pauses.resume(con, caller.org_id, scope)
        if resumed.was_paused:
            await _tell(caller, con, scope, "resumed", {})
    caller.ports.hints.wake(resumed.queues)
    return reply(
        {
            "object": "resumed",
            "was_paused": resumed.was_paused,
            "queues": list(resumed.queues),
        }
    )
