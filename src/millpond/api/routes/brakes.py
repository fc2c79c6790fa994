"""Brakes: keys that cool down after their provider was asked too much, and breakers that are open.

Called by clients. Invariant: an org takes off its own brakes only, an operator everybody's.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_limits import BrakeOut
from millpond.api.reply import listing, reply
from millpond.api.routes.platform import Reader as PlatformReader
from millpond.api.routes.platform import Writer as PlatformWriter
from millpond.api.texts import LongWord
from millpond.engine import easing
from millpond.engine.easing import Braked
from millpond.types import NO_ORG

router = APIRouter(prefix="/v1", tags=["limits"])

Reader = Annotated[Caller, requires("limits:read")]
Writer = Annotated[Caller, requires("limits:write")]
Key = Annotated[LongWord, Query(description="The key that is held back.")]
_GONE: dict[int | str, dict[str, Any]] = {204: {"description": "It is gone."}}


@router.get(
    "/limits/brakes",
    operation_id="list_brakes",
    responses={200: {"model": Listing[BrakeOut]}, **failures(401, 403, 503)},
)
async def list_brakes(caller: Reader) -> Response:
    """List what holds back the org's work: keys that cool down or recover, and breakers that are open."""
    return await _list(caller)


@router.delete(
    "/limits/brakes",
    operation_id="delete_brake",
    status_code=204,
    responses={**_GONE, **failures(401, 403, 404, 422, 503)},
)
async def delete_brake(caller: Writer, key: Key) -> Response:
    """Take a brake off the org's own work: it goes on at once, and as much as its limits allow."""
    return await _release(caller, key)


@router.get(
    "/platform/limits/brakes",
    operation_id="list_platform_brakes",
    responses={200: {"model": Listing[BrakeOut]}, **failures(401, 403, 503)},
)
async def list_platform_brakes(caller: PlatformReader) -> Response:
    """List what holds back everybody's work."""
    return await _list(caller)


@router.delete(
    "/platform/limits/brakes",
    operation_id="delete_platform_brake",
    status_code=204,
    responses={**_GONE, **failures(401, 403, 404, 422, 503)},
)
async def delete_platform_brake(caller: PlatformWriter, key: Key) -> Response:
    """Take a brake off everybody's work."""
    return await _release(caller, key)


async def _list(caller: Caller) -> Response:
    async with caller.org() as con:
        found = await easing.list_brakes(con)
    return reply(listing([brake_json(one) for one in found], has_more=False))


async def _release(caller: Caller, key: str) -> Response:
    async with caller.org() as con:
        await easing.release(con, key)
        await caller.tell(con, "brake.released", f"brake:{key}")
    caller.ports.hints.wake(["*"])
    return Response(status_code=204)


def brake_json(braked: Braked) -> dict[str, Any]:
    """Return a brake as it is now."""
    brake = braked.brake
    return {
        "id": f"{'platform' if brake.owner == NO_ORG else 'own'} {brake.key}",
        "object": "brake",
        "key": brake.key,
        "is_of_platform": brake.owner == NO_ORG,
        "state": braked.state,
        "until": braked.until,
        "opened_at": braked.opened_at,
        "factor": round(braked.factor, 4),
        "recovers_at": braked.recovers_at,
        "hits": brake.hits,
        "step": brake.step,
        "reason": brake.reason,
    }
