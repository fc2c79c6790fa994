"""Blocked runs: set going again once the code that their history needs is deployed.

Called by clients. Invariant: only a person ends the standstill of a blocked run.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Run
from millpond.api.reply import reply
from millpond.api.shapes import run_for
from millpond.engine import blocking, views

router = APIRouter(prefix="/v1/runs", tags=["runs"])

Operator = Annotated[Caller, requires("runs:operate")]


@router.post(
    "/{run_id}/resume",
    operation_id="resume_run",
    status_code=202,
    responses={202: {"model": Run}, **failures(401, 403, 404, 409, 422, 503)},
)
async def resume_run(caller: Operator, run_id: uuid.UUID) -> Response:
    """Queue a blocked run again, after code was deployed that its history matches.

    Without `runs:read` the answer has no input, output, error, labels and keys.
    """
    org_id = caller.org_id
    async with caller.org() as con:
        readied = await blocking.resume(con, org_id, run_id, caller.principal.subject)
        run = await views.get_run(con, org_id, run_id)
        await caller.tell(con, "run.resumed", f"run:{run_id}", run_id=run_id)
    caller.ports.hints.wake({one.queue for one in readied})
    caller.ports.hints.changed([run_id])
    headers = {"Location": f"/v1/runs/{run_id}", "Retry-After": "1"}
    return reply(run_for(caller.principal, run), status=202, headers=headers)
