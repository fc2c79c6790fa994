"""The feed: events of all runs of the org, as pages and as a stream.

Called by clients that follow everything, such as a console or a warehouse. Invariant: whoever goes on from the last
place that they were given misses nothing.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Listing, RunEventOut
from millpond.api.reply import listing, reply
from millpond.api.shapes import org_event_json
from millpond.api.sse import MEDIA_TYPE, EventStream
from millpond.api.texts import Word
from millpond.engine import feeds

router = APIRouter(prefix="/v1/run-events", tags=["runs"])

Reader = Annotated[Caller, requires("runs:read")]
NOW = "now"


@router.get(
    "",
    operation_id="list_org_events",
    responses={
        200: {
            "model": Listing[RunEventOut],
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
            "description": "A page of events, or with `Accept: text/event-stream` a stream that goes on.",
        },
        **failures(400, 401, 403, 422, 503),
    },
)
async def list_org_events(
    caller: Reader,
    after: Annotated[
        str,
        Query(
            max_length=80,
            description="Only events after this place; `now`: what comes from now on.",
        ),
    ] = "",
    kind: Annotated[
        list[Word] | None,
        Query(max_length=32, description="Only these kinds; may be given repeatedly."),
    ] = None,
    flow: Annotated[Word | None, Query(description="Only runs of this flow.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many, for a page.")] = 100,
    accept: Annotated[
        str, Header(description="`text/event-stream` follows live; else a page of JSON.")
    ] = "",
    last_event_id: Annotated[
        str | None, Header(description="Resume a stream after this place; goes before `after`.")
    ] = None,
) -> Response:
    """Show events of all runs of the org, in the order of the transactions that stored them.

    What is not yet below the oldest running transaction comes later, so that no late commit is skipped. On a page
    `last_id` is where to go on, also where nothing was found; a page may be empty and have more.
    """
    org_id, ports = caller.org_id, caller.ports
    wanted = feeds.Wanted(kinds=frozenset(kind) if kind else None, flow=flow)
    if MEDIA_TYPE in accept:
        place = await _place(caller, last_event_id, after)
        return EventStream(
            lambda reached: feeds.tail(ports.db, ports.feed, org_id, reached, wanted=wanted),
            after=place,
            stopping=ports.stopping,
            is_over=caller.is_over,
            ends_at=caller.expires_at,
        )
    place = await _place(caller, None, after)
    async with caller.org() as con:
        page = await feeds.page(con, org_id, place, wanted=wanted, limit=limit)
    data = [org_event_json(event) for event in page.events]
    return reply({**listing(data, has_more=page.has_more), "last_id": str(page.reached)})


async def _place(caller: Caller, last_event_id: str | None, after: str) -> feeds.Place:
    if last_event_id is not None and last_event_id.strip():
        return feeds.Place.read(last_event_id.strip(), param="Last-Event-ID")
    if after == NOW:
        async with caller.org() as con:
            return await feeds.now(con)
    return feeds.Place.read(after, param="after") if after else feeds.FIRST
