"""Triggers: flows that start when events arrive.

Called by clients. Invariant: a trigger is stored only by somebody who may start its flow, and only for
a flow that takes what the trigger gives it.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.accept import permit_start
from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_calendar import ChangeTrigger, CreateTrigger, TriggerDetail, TriggerOut
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_calendar import trigger_detail_json, trigger_json
from millpond.api.texts import Word
from millpond.db.pool import Connection
from millpond.engine import features, triggers
from millpond.engine.triggers import Draft
from millpond.identity import holdings

router = APIRouter(prefix="/v1/triggers", tags=["triggers"])

Reader = Annotated[Caller, requires("triggers:read")]
Writer = Annotated[Caller, requires("triggers:write")]
_ON_CHANGE = failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503)


@router.get(
    "",
    operation_id="list_triggers",
    responses={200: {"model": Listing[TriggerOut]}, **failures(401, 403, 422, 503)},
)
async def list_triggers(
    caller: Reader,
    page: Paged,
    name: Annotated[Word | None, Query(description="Only this name.")] = None,
) -> Response:
    """List the org's triggers, newest first."""
    async with caller.org() as con:
        found, has_more = await triggers.page(con, caller.org_id, page, name)
    return reply(listing([trigger_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_trigger",
    status_code=201,
    openapi_extra=described(CreateTrigger),
    responses={201: {"model": TriggerOut}, **_ON_CHANGE},
)
async def create_trigger(request: Request, caller: Writer) -> Response:
    """Make a trigger.

    The caller needs `runs:start` and the flow's own permission besides `triggers:write`.
    """
    draft = Draft(**(await read_json(request, CreateTrigger)).model_dump())
    await _check(caller, draft)
    async with caller.org() as con:
        made = await triggers.create(con, caller.org_id, draft, caller.principal.subject)
        await holdings.check(con, caller.org_id, "triggers")
        await _tell(caller, con, "created", made.trigger_id, draft)
    headers = {"Location": f"/v1/triggers/{made.trigger_id}"}
    return reply(trigger_json(made), status=201, headers=headers)


@router.get(
    "/{trigger_id}",
    operation_id="get_trigger",
    responses={200: {"model": TriggerDetail}, **failures(401, 403, 404, 422, 503)},
)
async def get_trigger(caller: Reader, trigger_id: uuid.UUID) -> Response:
    """Show one trigger with what waits for it."""
    async with caller.org() as con:
        found = await triggers.get(con, caller.org_id, trigger_id)
        waiting = await triggers.waiting(con, caller.org_id, trigger_id)
    return reply(trigger_detail_json(found, waiting))


@router.patch(
    "/{trigger_id}",
    operation_id="change_trigger",
    openapi_extra=described(ChangeTrigger),
    responses={200: {"model": TriggerOut}, **_ON_CHANGE},
)
async def change_trigger(request: Request, caller: Writer, trigger_id: uuid.UUID) -> Response:
    """Change a trigger; events that wait already keep the time that they were given."""
    wish = await read_json(request, ChangeTrigger)
    async with caller.org() as con:
        seen = await triggers.get(con, caller.org_id, trigger_id)
        await features.check(con, caller.org_id, "triggers")
    draft = replace(seen.draft, **wish.model_dump(exclude_unset=True))
    await _check(caller, draft)
    async with caller.org() as con:
        changed = await triggers.change(con, caller.org_id, seen, draft, caller.principal.subject)
        await _tell(caller, con, "changed", trigger_id, draft)
    return reply(trigger_json(changed))


@router.delete(
    "/{trigger_id}",
    operation_id="delete_trigger",
    status_code=204,
    responses={
        204: {"description": "It is gone with what waited for it; its runs stay."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def delete_trigger(caller: Writer, trigger_id: uuid.UUID) -> Response:
    """Remove a trigger with what waits for it; its runs stay."""
    async with caller.org() as con:
        await triggers.delete(con, caller.org_id, trigger_id)
        await caller.tell(con, "trigger.deleted", f"trigger:{trigger_id}")
    return Response(status_code=204)


@router.post(
    "/{trigger_id}/pause",
    operation_id="pause_trigger",
    responses={200: {"model": TriggerOut}, **failures(401, 403, 404, 409, 422, 503)},
)
async def pause_trigger(caller: Writer, trigger_id: uuid.UUID) -> Response:
    """Let a trigger take no events and start nothing until it is resumed."""
    return await _set_paused(caller, trigger_id, is_paused=True)


@router.post(
    "/{trigger_id}/resume",
    operation_id="resume_trigger",
    responses={200: {"model": TriggerOut}, **failures(401, 402, 403, 404, 409, 422, 503)},
)
async def resume_trigger(caller: Writer, trigger_id: uuid.UUID) -> Response:
    """Let a trigger take events again; what it held when it was paused and is due starts now."""
    return await _set_paused(caller, trigger_id, is_paused=False)


async def _check(caller: Caller, draft: Draft) -> None:
    """Raise unless the draft makes sense and the caller may start its flow with such events."""
    triggers.check(draft)
    catalog = caller.ports.catalog
    flow = await catalog.flow(draft.flow, draft.version)
    permit(caller.principal, "runs:start")
    permit_start(caller.principal, flow)
    if draft.queue is not None:
        await catalog.check_queue(draft.queue, flow)
    triggers.check_flow(draft, flow.input_schema)


async def _tell(
    caller: Caller, con: Connection, verb: str, trigger_id: uuid.UUID, draft: Draft
) -> None:
    details = {"name": draft.name, "flow": draft.flow}
    await caller.tell(con, f"trigger.{verb}", f"trigger:{trigger_id}", details=details)


async def _set_paused(caller: Caller, trigger_id: uuid.UUID, *, is_paused: bool) -> Response:
    async with caller.org() as con:
        if not is_paused:
            await features.check(con, caller.org_id, "triggers")
        changed = await triggers.set_paused(
            con, caller.org_id, trigger_id, caller.principal.subject, is_paused=is_paused
        )
        verb = "paused" if is_paused else "resumed"
        await _tell(caller, con, verb, trigger_id, changed.draft)
    return reply(trigger_json(changed))
