"""Workers: which processes are there, for what, and how busy they are.

Called by clients. Invariant: workers belong to no org, so nothing of what they work on is shown.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_control import WorkerOut
from millpond.api.reply import listing, reply
from millpond.api.shapes_control import worker_json
from millpond.engine import queues

router = APIRouter(prefix="/v1/workers", tags=["workers"])

Reader = Annotated[Caller, requires("workers:read")]


@router.get(
    "",
    operation_id="list_workers",
    responses={200: {"model": Listing[WorkerOut]}, **failures(401, 403, 503)},
)
async def list_workers(caller: Reader) -> Response:
    """List the workers whose heartbeat goes on, oldest first."""
    async with caller.org() as con:
        workers = await queues.list_workers(con)
    return reply(listing([worker_json(worker) for worker in workers], has_more=False))
