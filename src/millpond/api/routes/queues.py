"""Queues: how much waits in each, and how old the oldest is.

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
from millpond.engine import views

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
        queues = await views.list_queues(con, caller.org_id)
    return reply(listing([queue_json(queue) for queue in queues], has_more=False))
