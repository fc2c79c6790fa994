"""Queues: how much waits in each, how old the oldest is, and what is paused.

Called by clients. Invariant: counts are those of the caller's org alone.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Listing, QueueOut
from millpond.api.reply import listing, reply
from millpond.api.shapes import queue_json
from millpond.api.shapes_control import holding_json
from millpond.engine import pauses, queues

router = APIRouter(prefix="/v1/queues", tags=["queues"])

Reader = Annotated[Caller, requires("queues:read")]


@router.get(
    "",
    operation_id="list_queues",
    responses={200: {"model": Listing[QueueOut]}, **failures(401, 403, 503)},
)
async def list_queues(caller: Reader) -> Response:
    """List queues by name, with the org's own work in each."""
    async with caller.org() as con:
        found = await queues.list_queues(con, caller.org_id)
        held = await pauses.list_pauses(con, caller.org_id)
    data = [
        {**queue_json(one), "pauses": holding_json(held, caller.principal, queue=one.name)}
        for one in found
    ]
    return reply(listing(data, has_more=False))
