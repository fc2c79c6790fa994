"""Acting on many runs at once: told beforehand how many, then done by a run of its own.

Called by clients. Invariant: the caller's rights are checked as the action is accepted, and the run that
carries it out acts as the caller.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response

from millpond.api.accept import (
    IdempotencyKey,
    Traceparent,
    accept_with,
    accepted_headers,
    accepted_json,
    digest_of,
    may_start,
    promised,
    wellformed,
)
from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models import AcceptedRun
from millpond.api.models_reruns import BulkAction, BulkPreview, RunsFilter
from millpond.api.reply import reply
from millpond.api.shapes import run_json
from millpond.api.texts import moment
from millpond.db.pool import Connection
from millpond.engine import bulk, views
from millpond.engine.bulk import BulkFilter, BulkWish
from millpond.engine.registry import capability
from millpond.engine.views import PageOf, RunFilter
from millpond.errors import InvalidInput
from millpond.types import Intent

router = APIRouter(prefix="/v1/runs", tags=["runs"])

Reader = Annotated[Caller, requires("runs:read")]
_ROUTE = "POST /v1/runs/bulk"
_NEEDS = {"cancel": "runs:cancel", "rerun": "runs:start"}
_TOLD = {"cancel": "cancelled", "rerun": "rerun"}
_COUNT_MAX = 10_000
_EXAMPLES = 5


@router.post(
    "/bulk",
    operation_id="act_on_runs",
    status_code=202,
    openapi_extra=described(BulkAction),
    responses={
        200: {"model": BulkPreview, "description": "A dry run: how many runs it would be for."},
        202: {"model": AcceptedRun, "headers": ACCEPTED_HEADERS},
        **failures(400, 401, 402, 403, 413, 415, 422, 503),
    },
)
async def act_on_runs(
    request: Request,
    caller: Reader,
    key: IdempotencyKey = None,
    traceparent: Traceparent = None,
) -> Response:
    """Cancel or rerun all runs that fit a filter, by a run of its own; or only count them.

    Needs `runs:cancel`, or `runs:start` and the permissions of the flows: runs of others are skipped.
    """
    wish = await read_json(request, BulkAction)
    permit(caller.principal, _NEEDS[wish.action])
    if wish.skip_endings and wish.action != "cancel":
        raise InvalidInput("only a cancel skips endings", param="skip_endings")
    wanted = _filter(wish.filter)
    if wish.dry_run:
        return await _preview(caller, wish.action, wanted.wanted())
    flows = []
    if wish.action == "rerun":
        flows = [
            capability(one.name, one.version)
            for versions in await caller.ports.catalog.flows()
            for one in versions
            if may_start(caller.principal, one)
        ]
    body = BulkWish(
        action=wish.action,
        filter=wanted,
        reason=wish.reason,
        skip_endings=wish.skip_endings,
        flows=flows,
    )
    intent = Intent(
        org_id=caller.org_id,
        flow=bulk.FLOW,
        version=bulk.VERSION,
        queue=bulk.QUEUE,
        input=body.model_dump_json().encode(),
        subject=caller.principal.subject,
        traceparent=wellformed(traceparent),
        backing=caller.principal.backing(_NEEDS[wish.action]),
    )
    promise = promised(key, _ROUTE, lambda: digest_of(wish.model_dump(mode="json")))

    async def make(_: Connection) -> Intent:
        return intent

    async def follow(con: Connection, _: Intent) -> None:
        await caller.tell(
            con,
            f"runs.{_TOLD[wish.action]}",
            f"run:{intent.run_id}",
            details={"filter": wanted.model_dump(mode="json"), "reason": wish.reason},
            run_id=intent.run_id,
        )

    accepted = await accept_with(caller, make, promise, follow=follow)
    return reply(accepted_json(accepted), status=202, headers=accepted_headers(accepted))


async def _preview(caller: Caller, action: str, wanted: RunFilter) -> Response:
    async with caller.org() as con:
        ids, has_more = await views.find_runs(con, caller.org_id, wanted, PageOf(limit=_COUNT_MAX))
        examples = await views.show_runs(con, caller.org_id, ids[:_EXAMPLES])
    return reply(
        {
            "object": "bulk_preview",
            "action": action,
            "matched": len(ids),
            "is_exact": not has_more,
            "examples": [run_json(run) for run in examples],
        }
    )


def _filter(wish: RunsFilter) -> BulkFilter:
    """Return what is asked for; raises InvalidInput for a filter that names nothing."""
    given = wish.model_dump()
    if not any(given.values()):
        raise InvalidInput(
            "the filter names nothing; to act on all runs, name all states",
            param="filter",
            code="filter_empty",
        )
    for name in ("created_after", "created_before"):
        moment(getattr(wish, name), f"filter.{name}")
    return BulkFilter.model_validate(given)
