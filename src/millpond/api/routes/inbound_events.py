"""Inbound events: what others tell us, for the triggers that listen.

Called by clients. Invariant: a 202 is sent only after the event, and every run that it started at once,
were committed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.accept import IdempotencyKey, promised
from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_calendar import InboundEventOut, InboundEvents, SendEvent, SendEvents
from millpond.api.reply import listing, reply
from millpond.api.shapes_calendar import inbound_json
from millpond.api.texts import LongWord, Word
from millpond.engine import inbound
from millpond.engine.inbound import Incoming, Received
from millpond.errors import Conflict, InvalidInput
from millpond.types import new_id

router = APIRouter(prefix="/v1/events", tags=["events"])

_ROUTE = "POST /v1/events"
Sender = Annotated[Caller, requires("events:send")]
Reader = Annotated[Caller, requires("events:read")]
_REPEATED = {
    "Idempotency-Replayed": {
        "description": "`true` when this repeats the answer to an earlier request.",
        "schema": {"type": "string"},
    }
}


@router.post(
    "",
    operation_id="send_event",
    status_code=202,
    openapi_extra=described(SendEvent),
    responses={
        202: {"model": InboundEventOut, "headers": _REPEATED},
        **failures(400, 401, 403, 409, 413, 415, 422, 503),
    },
)
async def send_event(request: Request, caller: Sender, key: IdempotencyKey = None) -> Response:
    """Receive an event; answers with the runs that it started at once.

    A repeat with the same `id`, or else the same Idempotency-Key, is answered as the first.
    """
    wish = await read_json(request, SendEvent)
    promise = promised(key, _ROUTE, lambda: b"")
    made_up = _id_of_key(caller, promise.key) if promise is not None else str(new_id())
    event = Incoming(event_id=wish.id or made_up, name=wish.name, data=wish.data)
    try:
        (received,) = await _receive(caller, [event])
    except Conflict as error:
        if wish.id is not None or promise is None:
            raise
        raise InvalidInput(
            "This Idempotency-Key was used for another request.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
            advice="use a new key for a new request",
        ) from error
    headers = {"Idempotency-Replayed": "true"} if received.is_repeat else {}
    return reply(inbound_json(received, only_at_once=True), status=202, headers=headers)


@router.post(
    "/batch",
    operation_id="send_events",
    status_code=202,
    openapi_extra=described(SendEvents),
    responses={
        202: {"model": InboundEvents},
        **failures(400, 401, 403, 409, 413, 415, 422, 503),
    },
)
async def send_events(request: Request, caller: Sender) -> Response:
    """Receive up to 1,000 events, all or none of them, in their order."""
    wish = await read_json(request, SendEvents)
    events = [
        Incoming(event_id=one.id or str(new_id()), name=one.name, data=one.data)
        for one in wish.events
    ]
    received = await _receive(caller, events)
    answers = [inbound_json(one, only_at_once=True) for one in received]
    return reply({"data": answers}, status=202)


@router.get(
    "",
    operation_id="list_events",
    responses={200: {"model": Listing[InboundEventOut]}, **failures(401, 403, 422, 503)},
)
async def list_events(
    caller: Reader,
    name: Annotated[Word | None, Query(description="Only this name.")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="How many entries at most.")] = 50,
    after: Annotated[
        LongWord | None, Query(description="Go on after this id: `last_id` of a page.")
    ] = None,
    before: Annotated[
        LongWord | None, Query(description="Go back before this id: `first_id`.")
    ] = None,
) -> Response:
    """List events as they were received, newest first, with the runs that they started."""
    if after is not None and before is not None:
        raise InvalidInput("give `after` or `before`, not both", param="before")
    async with caller.org() as con:
        found, has_more = await inbound.page(
            con, caller.org_id, limit=limit, after=after, before=before, name=name
        )
    return reply(listing([inbound_json(one) for one in found], has_more=has_more))


async def _receive(caller: Caller, events: Sequence[Incoming]) -> list[Received]:
    async with caller.org() as con:
        received, started = await inbound.receive(
            con, caller.org_id, events, caller.principal.subject
        )
    caller.ports.hints.wake({run.queue for run in started})
    return received


def _id_of_key(caller: Caller, key: str) -> str:
    """Return the id of an event that is known by its sender's key: theirs alone."""
    digest = hashlib.sha256(f"{caller.principal.subject}\n{key}".encode()).hexdigest()
    return f"key:{digest[:40]}"
