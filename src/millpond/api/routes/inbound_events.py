"""Inbound events: what others tell us, for the triggers that listen.

Called by clients. Invariant: a 202 is sent only after the event, and every run that it started at once,
were committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from millpond.api.accept import (
    IdempotencyKey,
    digest_of,
    find_answer,
    keep_promise,
    note_answer,
    promised,
)
from millpond.api.auth import Caller, requires
from millpond.api.batches import Promise
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_calendar import InboundEventOut, InboundEvents, SendEvent, SendEvents
from millpond.api.reply import listing, reply
from millpond.api.shapes_calendar import inbound_json
from millpond.api.texts import LongWord, Word
from millpond.db.pool import Connection
from millpond.engine import inbound
from millpond.engine.inbound import Incoming, Received
from millpond.engine.quotas import Ticket
from millpond.engine.waits import Readied
from millpond.errors import InvalidInput
from millpond.types import new_id

router = APIRouter(prefix="/v1/events", tags=["events"])

_ROUTE = "POST /v1/events"
Sender = Annotated[Caller, requires("events:send")]
Reader = Annotated[Caller, requires("events:read")]
_REPLAYED = {"Idempotency-Replayed": "true"}
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

    A repeat with the same `id` or the same Idempotency-Key is answered as the first.
    """
    wish = await read_json(request, SendEvent)
    promise = promised(key, _ROUTE, lambda: digest_of(wish.model_dump()))
    (received,), _ = await _receive(caller, [_incoming(wish)], promise)
    headers = _REPLAYED if received.is_repeat else {}
    return reply(inbound_json(received, only_at_once=True), status=202, headers=headers)


@router.post(
    "/batch",
    operation_id="send_events",
    status_code=202,
    openapi_extra=described(SendEvents),
    responses={
        202: {"model": InboundEvents, "headers": _REPEATED},
        **failures(400, 401, 403, 409, 413, 415, 422, 503),
    },
)
async def send_events(request: Request, caller: Sender, key: IdempotencyKey = None) -> Response:
    """Receive up to 1,000 events, all or none of them, in their order.

    An Idempotency-Key stands for the whole batch.
    """
    wish = await read_json(request, SendEvents)
    promise = promised(key, f"{_ROUTE}/batch", lambda: digest_of(wish.model_dump()))
    received, is_repeat = await _receive(caller, [_incoming(one) for one in wish.events], promise)
    answers = [inbound_json(one, only_at_once=True) for one in received]
    return reply({"data": answers}, status=202, headers=_REPLAYED if is_repeat else {})


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


async def _receive(
    caller: Caller, events: Sequence[Incoming], promise: Promise | None
) -> tuple[list[Received], bool]:
    """Receive events once per key; also tells whether they had been."""
    org_id, subject = caller.org_id, caller.principal.subject

    async def work(ticket: Ticket) -> tuple[list[Received], list[Readied], bool]:
        async with caller.org() as con:
            first_ids = None if promise is None else await _promise(con, caller, events, promise)
            ids = [event.event_id for event in events] if first_ids is None else first_ids
            named = [replace(event, event_id=one) for event, one in zip(events, ids, strict=True)]
            received, started = await inbound.receive(con, org_id, named, subject, ticket)
        return received, started, first_ids is not None

    received, started, is_repeat = await caller.ports.reserver.spending_some(
        org_id, len(events), work
    )
    caller.ports.hints.wake({run.queue for run in started})
    return received, is_repeat


async def _promise(
    con: Connection, caller: Caller, events: Sequence[Incoming], promise: Promise
) -> list[str] | None:
    """Let a key stand for these events; returns the ids that it had been given for, if it had."""
    principal, marker = caller.principal, new_id()
    first = await find_answer(con, principal, promise)
    if first is None and not await keep_promise(con, principal, promise, marker):
        first = await find_answer(con, principal, promise)  # a rival's, committed meanwhile
    if first is not None:
        ids: list[str] = first["ids"]
        return ids
    answer = orjson.dumps({"ids": [event.event_id for event in events]}).decode()
    await note_answer(con, principal, promise, marker, answer)
    return None


def _incoming(wish: SendEvent) -> Incoming:
    return Incoming(event_id=wish.id or str(new_id()), name=wish.name, data=wish.data)
