"""Usage and quotas of the caller's organization.

Called by clients. Invariant: nothing here writes.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models_plans import QuotasOut, UsageListing
from millpond.api.reply import reply
from millpond.api.shapes_plans import quotas_json, usage_json
from millpond.api.texts import Word
from millpond.errors import InvalidInput
from millpond.identity import plans
from millpond.identity.plans import UsageWish

router = APIRouter(prefix="/v1", tags=["usage"])

Reader = Annotated[Caller, requires("usage:read")]
By = Literal["day", "flow", "model"]


@router.get(
    "/usage",
    operation_id="get_usage",
    responses={200: {"model": UsageListing}, **failures(401, 403, 422, 503)},
)
async def get_usage(
    caller: Reader,
    since: Annotated[
        date | None, Query(description="First day (UTC); that of this month if left out.")
    ] = None,
    until: Annotated[date | None, Query(description="Last day (UTC); today if left out.")] = None,
    flow: Annotated[Word | None, Query(description="Only this flow.")] = None,
    model: Annotated[Word | None, Query(description="Only this model.")] = None,
    by: Annotated[
        list[By] | None,
        Query(max_length=3, description="What to part the sums by; `day` if left out."),
    ] = None,
) -> Response:
    """Show what the organization used: runs, worker-seconds, tokens, cost. It is told within seconds."""
    async with caller.org() as con:
        today = await plans.today(con)
        last = until or today
        wish = UsageWish(
            since=since or last.replace(day=1),
            until=last,
            flow=flow,
            model=model,
            by=frozenset(by or ("day",)),
        )
        if wish.since > wish.until:
            raise InvalidInput("`since` is after `until`", param="since")
        rows, has_more = await plans.read_usage(con, caller.org_id, wish)
    return reply(usage_json(wish, rows, has_more=has_more))


@router.get(
    "/quotas",
    operation_id="get_quotas",
    responses={200: {"model": QuotasOut}, **failures(401, 403, 503)},
)
async def get_quotas(caller: Reader) -> Response:
    """Show the organization's plan, and what it has used of each quota."""
    async with caller.org() as con:
        found = await plans.read_org_plan(con, caller.org_id)
    return reply(quotas_json(found))
