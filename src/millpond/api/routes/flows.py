"""Flows: what workers have published, with input schemas.

Called by clients. Invariant: a flow is listed as its newest version has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Response

from millpond.api.accept import may_start
from millpond.api.auth import Caller, requires
from millpond.api.documented import failures
from millpond.api.models import FlowOut, Listing
from millpond.api.reply import listing, reply
from millpond.api.shapes import flow_json
from millpond.api.shapes_control import holding_json
from millpond.api.texts import Word
from millpond.engine.pauses import Pause, list_pauses
from millpond.engine.views import FlowView

router = APIRouter(prefix="/v1/flows", tags=["flows"])

Reader = Annotated[Caller, requires("flows:read")]


@router.get(
    "",
    operation_id="list_flows",
    responses={200: {"model": Listing[FlowOut]}, **failures(401, 403, 503)},
)
async def list_flows(caller: Reader) -> Response:
    """List all flows by name; the list is empty until a worker has published one."""
    found = await caller.ports.catalog.flows()
    held = await _pauses(caller)
    flows = [_shown(caller, versions, held) for versions in found]
    return reply(listing(flows, has_more=False))


@router.get(
    "/{name}",
    operation_id="get_flow",
    responses={200: {"model": FlowOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_flow(caller: Reader, name: Word) -> Response:
    """Show one flow."""
    versions = await caller.ports.catalog.versions(name)
    return reply(_shown(caller, versions, await _pauses(caller)))


async def _pauses(caller: Caller) -> list[Pause]:
    async with caller.org() as con:
        return await list_pauses(con, caller.org_id)


def _shown(caller: Caller, versions: Sequence[FlowView], held: Sequence[Pause]) -> dict[str, Any]:
    newest = versions[-1]
    return {
        **flow_json(versions, may_start=may_start(caller.principal, newest)),
        "pauses": holding_json(held, caller.principal, queue=newest.queue, flow=newest.name),
    }
