"""Runs: start, list, show, follow, cancel.

Called by clients. Invariant: a 202 is sent only after the run was committed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from millpond.api.accept import (
    ACCEPT_PARAMETERS,
    Accepted,
    accept,
    accepted_headers,
    accepted_json,
    digest_of,
    intent_of,
    permit_start,
    promised,
    recall,
)
from millpond.api.auth import Caller, permit, requires
from millpond.api.batches import Promise
from millpond.api.bodies import MAX_START_BYTES, described, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models import (
    AcceptedRun,
    CancelRun,
    EventOut,
    Listing,
    Run,
    RunDetail,
    StartRun,
)
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes import event_json, run_detail_json, run_for, run_json
from millpond.api.sse import MEDIA_TYPE, EventStream
from millpond.api.texts import LabelPair, Word, moment
from millpond.engine import events, growing, operations, views
from millpond.engine.fitting import check_fits, has_need
from millpond.engine.views import FlowView, PageOf, RunFilter
from millpond.errors import InvalidInput
from millpond.types import Json, RunState

router = APIRouter(prefix="/v1/runs", tags=["runs"])

_ROUTE = "POST /v1/runs"
_MAX_EVENT_NO = 2**31 - 1
Starter = Annotated[Caller, requires("runs:start")]
Reader = Annotated[Caller, requires("runs:read")]
Canceller = Annotated[Caller, requires("runs:cancel")]


@router.post(
    "",
    operation_id="start_run",
    status_code=202,
    openapi_extra=described(StartRun, parameters=ACCEPT_PARAMETERS),
    responses={
        202: {"model": AcceptedRun, "headers": ACCEPTED_HEADERS},
        **failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def start_run(request: Request, caller: Starter) -> Response:
    """Accept a run of a flow.

    The input is validated against the schema that workers published. The caller needs the flow's own
    permission besides `runs:start`.
    """
    wish = await read_json(request, StartRun, max_bytes=MAX_START_BYTES)
    flow = await caller.ports.catalog.flow(wish.flow, wish.version)
    permit_start(caller.principal, flow)
    if wish.on_duplicate == "cancel_old":
        permit(caller.principal, "runs:cancel")
    key = request.headers.get("idempotency-key")
    promise = promised(key, _ROUTE, lambda: digest_of(_told(wish)))
    accepted = await _accept(caller, wish, flow, promise, request.headers.get("traceparent"))
    return reply(accepted_json(accepted), status=202, headers=accepted_headers(accepted))


def _told(wish: StartRun) -> Json:
    """Return what makes a repeat another request: fields that came later count where they are set.

    Else the same body would be told apart from itself across an upgrade.
    """
    unset = {name for name in ("urgency", "tokens") if getattr(wish, name) is None}
    told: Json = wish.model_dump(exclude=unset)
    return told


async def _accept(
    caller: Caller,
    wish: StartRun,
    flow: FlowView,
    promise: Promise | None,
    traceparent: str | None,
) -> Accepted:
    """Validate and accept; what was accepted before under the same key needs no validation again."""
    intent = intent_of(caller, wish, flow, traceparent)
    try:
        await caller.ports.catalog.check_queue(intent.queue, flow)
        caller.ports.catalog.check_input(flow, wish.input)
        if has_need(intent):
            async with caller.org() as con:
                await check_fits(con, caller.org_id, [intent])
        return await accept(caller, intent, promise, wish.on_duplicate)
    except InvalidInput as error:
        if promise is None or error.code == "idempotency_key_reused":
            raise
        first = await recall(caller, promise, is_delayed=intent.delay_s > 0)
        if first is None:
            raise
        return first


@router.get(
    "",
    operation_id="list_runs",
    responses={200: {"model": Listing[Run]}, **failures(401, 403, 422, 503)},
)
async def list_runs(
    caller: Reader,
    page: Paged,
    state: Annotated[
        list[RunState] | None, Query(description="Only these states; may be given repeatedly.")
    ] = None,
    flow: Annotated[Word | None, Query(description="Only this flow.")] = None,
    queue: Annotated[Word | None, Query(description="Only this queue.")] = None,
    created_after: Annotated[datetime | None, Query(description="Made at or after.")] = None,
    created_before: Annotated[datetime | None, Query(description="Made before.")] = None,
    q: Annotated[
        Word | None, Query(description="Part of flow or labels, or start of the id.")
    ] = None,
    label: Annotated[
        list[LabelPair] | None,
        Query(max_length=16, description="Only with this label, `name=value`; may be repeated."),
    ] = None,
) -> Response:
    """List the org's runs, newest first; of filters, all have to fit."""
    wanted = RunFilter(
        states=frozenset(state or ()),
        flow=flow,
        queue=queue,
        created_after=moment(created_after, "created_after"),
        created_before=moment(created_before, "created_before"),
        search=q,
        labels=_labels(label or ()),
    )
    async with caller.org() as con:
        runs, has_more = await views.list_runs(con, caller.org_id, wanted, page)
    return reply(listing([run_json(run) for run in runs], has_more=has_more))


@router.get(
    "/{run_id}",
    operation_id="get_run",
    responses={200: {"model": RunDetail}, **failures(401, 403, 404, 422, 503)},
)
async def get_run(caller: Reader, run_id: uuid.UUID) -> Response:
    """Show one run with its recorded steps and open questions."""
    org_id = caller.org_id
    async with caller.org() as con:
        run = await views.get_run(con, org_id, run_id)
        steps = await views.list_steps(con, org_id, run_id)
        requests, _ = await views.list_requests(
            con, org_id, PageOf(limit=200), state="pending", run_id=run_id
        )
        kin = await views.get_kin(con, org_id, run_id)
        state_values = await views.state_values(con, org_id, run_id)
        reruns = await views.list_reruns(con, org_id, run_id)
    return reply(run_detail_json(run, steps, requests, kin, state_values, reruns))


@router.get(
    "/{run_id}/events",
    operation_id="list_run_events",
    responses={
        200: {
            "model": Listing[EventOut],
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
            "description": "A page of events, or with `Accept: text/event-stream` all of them, live.",
        },
        204: {"description": "The stream has nothing left: its run has ended."},
        **failures(400, 401, 403, 404, 422, 503),
    },
)
async def list_run_events(
    caller: Reader,
    run_id: uuid.UUID,
    after: Annotated[
        int, Query(ge=0, le=_MAX_EVENT_NO, description="Only events with a higher number.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many, for a page.")] = 100,
    accept: Annotated[
        str, Header(description="`text/event-stream` follows live; else a page of JSON.")
    ] = "",
    last_event_id: Annotated[
        str | None, Header(description="Resume a stream after this number; goes before `after`.")
    ] = None,
) -> Response:
    """Show a run's events: a page of JSON, or a live stream that ends after the final event.

    On the stream, what steps show while they go on comes between as `event: delta`, without `id:`.
    """
    org_id = caller.org_id
    if MEDIA_TYPE in accept:
        return await _stream(caller, run_id, _resume(last_event_id, after))
    async with caller.org() as con:
        await views.event_position(con, org_id, run_id)
        found = await events.page(con, org_id, run_id, after=after, limit=limit + 1)
    data = [event_json(event) for event in found[:limit]]
    return reply(listing(data, has_more=len(found) > limit))


@router.post(
    "/{run_id}/cancel",
    operation_id="cancel_run",
    status_code=202,
    openapi_extra=described(CancelRun, is_required=False),
    responses={202: {"model": Run}, **failures(400, 401, 403, 404, 409, 413, 415, 422, 503)},
)
async def cancel_run(request: Request, caller: Canceller, run_id: uuid.UUID) -> Response:
    """Stop a run: at once when nothing executes it, else as soon as its worker has let go.

    A begun run with something to undo, or with a step of unknown outcome, is queued for that first.
    Without `runs:read` the answer has no input, output, error, labels and keys.
    """
    wish = await read_json(request, CancelRun, is_optional=True)
    org_id = caller.org_id
    async with caller.org() as con:
        stopped = await operations.stop(
            con,
            org_id,
            run_id,
            caller.principal.subject,
            wish.reason,
            skip_endings=wish.skip_endings,
        )
        run = await views.get_run(con, org_id, run_id)
        details = {"reason": wish.reason, "skip_endings": wish.skip_endings}
        await caller.tell(con, "run.cancelled", f"run:{run_id}", details=details, run_id=run_id)
    if run.state is RunState.QUEUED:
        caller.ports.hints.wake([run.queue])
    caller.ports.hints.cancelled([run_id])
    caller.ports.hints.changed([run_id, *(one.run_id for one in stopped.readied)])
    caller.ports.hints.wake({one.queue for one in stopped.readied})
    headers = {"Location": f"/v1/runs/{run_id}", "Retry-After": "1"}
    return reply(run_for(caller.principal, run), status=202, headers=headers)


async def _stream(caller: Caller, run_id: uuid.UUID, after: int) -> Response:
    org_id, ports = caller.org_id, caller.ports
    async with caller.org() as con:
        position = await views.event_position(con, org_id, run_id)
    if position.is_over and after >= position.last_no:
        # Tells browsers not to come back; the type is for clients that look at nothing else.
        return Response(status_code=204, headers={"Content-Type": MEDIA_TYPE})
    reader = growing.Reader()
    return EventStream(
        lambda number: events.tail_with_text(
            ports.db, ports.feed, org_id, run_id, reader, after=number
        ),
        after=after,
        stopping=ports.stopping,
        is_over=caller.is_over,
        ends_at=caller.expires_at,
    )


def _resume(last_event_id: str | None, after: int) -> int:
    if last_event_id is None or not last_event_id.strip():
        return after
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 10:
        raise InvalidInput(
            "Last-Event-ID is the number of an event.",
            code="malformed_header",
            param="Last-Event-ID",
        )
    return min(int(last_event_id), _MAX_EVENT_NO)


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise InvalidInput("a label is given as name=value", param="label")
        if labels.setdefault(name, value) != value:
            raise InvalidInput(f"the label {name} cannot have two values", param="label")
    return labels
