"""Saturation: how full limits, queues and orgs are, and what waits for room there.

Called by clients. Invariant: an org sees its own work alone, an operator of orgs no more than how much there is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Response

from millpond.api.auth import permit
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_limits import PlatformSaturationOut, SaturationOut
from millpond.api.reply import listing, reply
from millpond.api.routes.limits import Reader
from millpond.api.routes.platform import Reader as PlatformReader
from millpond.api.texts import StepKey
from millpond.engine.saturation import Saturation, saturation
from millpond.engine.saturation_of_all import Of, page_of_all
from millpond.types import NO_ORG

router = APIRouter(prefix="/v1", tags=["limits"])

StarvedAfter = Annotated[
    float,
    Query(
        ge=0,
        le=31_622_400,
        allow_inf_nan=False,
        description="Work counts as starved after it has been ready for so many seconds.",
    ),
]


@router.get(
    "/limits/saturation",
    operation_id="list_saturation",
    responses={200: {"model": Listing[SaturationOut]}, **failures(401, 403, 422, 503)},
)
async def list_saturation(caller: Reader, starved_after_s: StarvedAfter = 60.0) -> Response:
    """List how full the org, its queues and the limits are that its work meets, and what waits for room there.

    Needs `queues:read` too. At most 500 limits, those with most waiting first.
    """
    permit(caller.principal, "queues:read")
    async with caller.org() as con:
        found, has_more = await saturation(con, caller.org_id)
    return reply(listing([_of_org(one, starved_after_s) for one in found], has_more=has_more))


@router.get(
    "/platform/limits/saturation",
    operation_id="list_platform_saturation",
    responses={200: {"model": Listing[PlatformSaturationOut]}, **failures(401, 403, 422, 503)},
)
async def list_platform_saturation(
    caller: PlatformReader,
    of: Annotated[Literal["queue", "limit", "org"] | None, Query(description="Only these.")] = None,
    starved_after_s: StarvedAfter = 60.0,
    limit: Annotated[int, Query(ge=1, le=200, description="How many entries at most.")] = 50,
    after: Annotated[
        StepKey | None,
        Query(
            pattern=r"^(queue|limit|org) .",
            description="Go on after this id: `last_id` of a page.",
        ),
    ] = None,
) -> Response:
    """List how full all queues, then the platform's limits, then orgs are, and what waits for room there, by name.

    Of what orgs hold nothing is told but how much: keys that only callers gave stand behind their limit's
    pattern, limits of an org's own count in its row.
    """
    async with caller.org() as con:
        found, has_more = await page_of_all(con, of, _place(after), limit)
    return reply(listing([_of_all(one, starved_after_s) for one in found], has_more=has_more))


def _place(after: str | None) -> tuple[Of, str] | None:
    if after is None:
        return None
    of, _, name = after.partition(" ")
    return cast(Of, of), name


def _of_org(one: Saturation, starved_after_s: float) -> dict[str, Any]:
    rule = one.rule
    owner = "" if rule is None else "platform " if rule.owner == NO_ORG else "own "
    return {
        "id": f"{one.of} {one.name}"
        if rule is None
        else f"limit {owner}{rule.kind} {rule.key} {one.name}",
        "object": "saturation",
        "is_of_platform": None if rule is None else rule.owner == NO_ORG,
        "own": one.own,
        **_figures(one, starved_after_s),
    }


def _of_all(one: Saturation, starved_after_s: float) -> dict[str, Any]:
    rule = one.rule
    return {
        "id": f"{one.of} {one.name}"
        if rule is None
        else f"limit {rule.kind} {rule.key} {one.name}",
        "object": "platform_saturation",
        "keys": one.keys,
        "orgs": one.orgs,
        **_figures(one, starved_after_s),
    }


def _figures(one: Saturation, starved_after_s: float) -> dict[str, Any]:
    rule, full = one.rule, one.full
    return {
        "of": one.of,
        "name": one.name,
        "limit": None if rule is None else rule.key,
        "kind": None if rule is None else rule.kind,
        "in_use": one.in_use,
        "maximum": one.maximum,
        "is_exact": one.is_exact,
        "until": one.until,
        "waiting": one.waiting,
        "is_waiting_exact": one.is_waiting_exact,
        "oldest_s": one.oldest_s,
        "is_starved": one.is_starved(starved_after_s),
        "full_minute": None if full.of_minute is None else round(full.of_minute, 4),
        "full_hour": None if full.of_hour is None else round(full.of_hour, 4),
    }
