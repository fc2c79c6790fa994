"""Why: what a run waits for.

Called by clients. Invariant: the reasons are read from one snapshot and take no lock.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models_control import WhyOut
from millpond.api.reply import reply
from millpond.api.shapes_control import why_json
from millpond.engine.why import anonymous, explain

router = APIRouter(prefix="/v1/runs", tags=["runs"])

Reader = Annotated[Caller, requires("runs:read")]


@router.get(
    "/{run_id}/why",
    operation_id="explain_run",
    responses={200: {"model": WhyOut}, **failures(401, 403, 404, 422, 503)},
)
async def explain_run(caller: Reader, run_id: uuid.UUID) -> Response:
    """Tell why a run does not run: every reason with its facts, and as one line.

    The hosts and processes of workers are named to those with `workers:read`.
    """
    async with caller.org(is_snapshot=True) as con:
        why = await explain(con, caller.org_id, run_id)
    return reply(why_json(why if caller.principal.may("workers:read") else anonymous(why)))
