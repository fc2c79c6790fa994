"""Schedules: runs that start by the clock.

Called by clients. Invariant: a schedule is stored only by somebody who may start its flow, with an
input that fits the flow as it is published then.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from millpond.api.accept import (
    IdempotencyKey,
    accept_with,
    accepted_headers,
    accepted_json,
    digest_of,
    permit_start,
    promised,
    recall,
)
from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models import AcceptedRun, Listing
from millpond.api.models_calendar import (
    ChangeSchedule,
    CreateSchedule,
    ScheduleDetail,
    ScheduleOut,
)
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_calendar import schedule_detail_json, schedule_json
from millpond.api.texts import Word
from millpond.db.pool import Connection
from millpond.engine import features, schedules, views
from millpond.engine.calendar import calendar
from millpond.engine.schedules import LABEL, Draft, Schedule
from millpond.engine.submit import deadline_of
from millpond.engine.views import FlowView
from millpond.errors import InvalidInput, NotFound
from millpond.identity import holdings
from millpond.types import Intent

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])

_MAX_INPUT_BYTES = 256 * 1024
Reader = Annotated[Caller, requires("schedules:read")]
Writer = Annotated[Caller, requires("schedules:write")]
_ON_CHANGE = failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503)


@router.get(
    "",
    operation_id="list_schedules",
    responses={200: {"model": Listing[ScheduleOut]}, **failures(401, 403, 422, 503)},
)
async def list_schedules(
    caller: Reader,
    page: Paged,
    name: Annotated[Word | None, Query(description="Only this name.")] = None,
) -> Response:
    """List the org's schedules, newest first."""
    async with caller.org() as con:
        found, has_more = await schedules.page(con, caller.org_id, page, name)
    return reply(listing([schedule_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_schedule",
    status_code=201,
    openapi_extra=described(CreateSchedule),
    responses={201: {"model": ScheduleOut}, **_ON_CHANGE},
)
async def create_schedule(request: Request, caller: Writer) -> Response:
    """Make a schedule.

    The caller needs `runs:start` and the flow's own permission besides `schedules:write`.
    """
    draft = Draft(**(await read_json(request, CreateSchedule)).model_dump())
    await _check(caller, draft)
    async with caller.org() as con:
        made = await schedules.create(con, caller.org_id, draft, caller.principal.subject)
        await holdings.check(con, caller.org_id, "schedules")
        await _tell(caller, con, "created", made.schedule_id, draft)
    headers = {"Location": f"/v1/schedules/{made.schedule_id}"}
    return reply(schedule_json(made), status=201, headers=headers)


@router.get(
    "/{schedule_id}",
    operation_id="get_schedule",
    responses={200: {"model": ScheduleDetail}, **failures(401, 403, 404, 422, 503)},
)
async def get_schedule(caller: Reader, schedule_id: uuid.UUID) -> Response:
    """Show one schedule with its next five times and its last run."""
    async with caller.org() as con:
        found = await schedules.get(con, caller.org_id, schedule_id)
        next_times = await schedules.upcoming(con, found.draft)
        last_run = await _last_run(con, caller.org_id, found)
    return reply(schedule_detail_json(found, next_times, last_run, caller.principal))


@router.patch(
    "/{schedule_id}",
    operation_id="change_schedule",
    openapi_extra=described(ChangeSchedule),
    responses={200: {"model": ScheduleOut}, **_ON_CHANGE},
)
async def change_schedule(request: Request, caller: Writer, schedule_id: uuid.UUID) -> Response:
    """Change a schedule; a new expression or time zone counts from now."""
    wish = await read_json(request, ChangeSchedule)
    async with caller.org() as con:
        seen = await schedules.get(con, caller.org_id, schedule_id)
        await features.check(con, caller.org_id, "schedules")
    draft = replace(seen.draft, **wish.model_dump(exclude_unset=True))
    await _check(caller, draft)
    async with caller.org() as con:
        changed = await schedules.change(con, caller.org_id, seen, draft, caller.principal.subject)
        await _tell(caller, con, "changed", schedule_id, draft)
    return reply(schedule_json(changed))


@router.delete(
    "/{schedule_id}",
    operation_id="delete_schedule",
    status_code=204,
    responses={
        204: {"description": "It is gone; its runs stay."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def delete_schedule(caller: Writer, schedule_id: uuid.UUID) -> Response:
    """Remove a schedule; its runs stay."""
    async with caller.org() as con:
        await schedules.delete(con, caller.org_id, schedule_id)
        await caller.tell(con, "schedule.deleted", f"schedule:{schedule_id}")
    return Response(status_code=204)


@router.post(
    "/{schedule_id}/pause",
    operation_id="pause_schedule",
    responses={200: {"model": ScheduleOut}, **failures(401, 403, 404, 409, 422, 503)},
)
async def pause_schedule(caller: Writer, schedule_id: uuid.UUID) -> Response:
    """Let a schedule start nothing until it is resumed."""
    return await _set_paused(caller, schedule_id, is_paused=True)


@router.post(
    "/{schedule_id}/resume",
    operation_id="resume_schedule",
    responses={200: {"model": ScheduleOut}, **failures(401, 402, 403, 404, 409, 422, 503)},
)
async def resume_schedule(caller: Writer, schedule_id: uuid.UUID) -> Response:
    """Let a schedule go on from now; what fell into the pause is not made up for."""
    return await _set_paused(caller, schedule_id, is_paused=False)


@router.post(
    "/{schedule_id}/run_now",
    operation_id="run_schedule_now",
    status_code=202,
    responses={
        202: {"model": AcceptedRun, "headers": ACCEPTED_HEADERS},
        **failures(400, 401, 402, 403, 404, 422, 503),
    },
)
async def run_schedule_now(
    caller: Writer, schedule_id: uuid.UUID, key: IdempotencyKey = None
) -> Response:
    """Start a schedule's flow now, as the caller, besides its times and whether paused or not."""
    promise = promised(key, f"POST /v1/schedules/{schedule_id}/run_now", lambda: digest_of(None))
    if promise is not None and (first := await recall(caller, promise, is_delayed=False)):
        return reply(accepted_json(first), status=202, headers=accepted_headers(first))
    async with caller.org() as con:
        found = await schedules.get(con, caller.org_id, schedule_id)
        await features.check(con, caller.org_id, "schedules")
    flow = await _check(caller, found.draft)

    async def make(con: Connection) -> Intent:
        intent = _intent(caller, found, flow)
        await schedules.note_started(con, caller.org_id, schedule_id, intent.run_id)
        return intent

    accepted = await accept_with(caller, make, promise)
    return reply(accepted_json(accepted), status=202, headers=accepted_headers(accepted))


def _intent(caller: Caller, schedule: Schedule, flow: FlowView) -> Intent:
    draft = schedule.draft
    return Intent(
        org_id=caller.org_id,
        flow=flow.name,
        version=flow.version,
        queue=draft.queue or flow.queue,
        input=orjson.dumps(draft.input),
        subject=caller.principal.subject,
        priority=draft.priority,
        keys=flow.keys,
        timeout_s=flow.timeout_s,
        deadline_s=deadline_of(flow.deadline_s),
        labels={**draft.labels, LABEL: draft.name},
        backing=caller.principal.backing("runs:start", flow.permission),
    )


async def _check(caller: Caller, draft: Draft) -> FlowView:
    """Return the flow of a schedule; raises unless the caller may start it with this draft."""
    calendar(draft.cron, draft.time_zone)
    catalog = caller.ports.catalog
    flow = await catalog.flow(draft.flow, draft.version)
    permit(caller.principal, "runs:start")
    permit_start(caller.principal, flow)
    if draft.queue is not None:
        await catalog.check_queue(draft.queue, flow)
    catalog.check_input(flow, draft.input)
    if len(orjson.dumps(draft.input)) > _MAX_INPUT_BYTES:
        raise InvalidInput(
            f"a schedule's input has at most {_MAX_INPUT_BYTES} bytes",
            param="input",
            code="too_large",
        )
    return flow


async def _tell(
    caller: Caller, con: Connection, verb: str, schedule_id: uuid.UUID, draft: Draft
) -> None:
    details = {"name": draft.name, "flow": draft.flow}
    await caller.tell(con, f"schedule.{verb}", f"schedule:{schedule_id}", details=details)


async def _set_paused(caller: Caller, schedule_id: uuid.UUID, *, is_paused: bool) -> Response:
    async with caller.org() as con:
        if not is_paused:
            await features.check(con, caller.org_id, "schedules")
        changed = await schedules.set_paused(
            con, caller.org_id, schedule_id, caller.principal.subject, is_paused=is_paused
        )
        verb = "paused" if is_paused else "resumed"
        await _tell(caller, con, verb, schedule_id, changed.draft)
    return reply(schedule_json(changed))


async def _last_run(con: Connection, org_id: int, schedule: Schedule) -> views.RunView | None:
    if schedule.last_run_id is None:
        return None
    try:
        return await views.get_run(con, org_id, schedule.last_run_id)
    except NotFound:
        return None
