"""Service principals: programs that act in the organization as themselves.

Called by clients. Invariant: none is ever removed; disabled, it does nothing more.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_orgs import (
    ChangeServicePrincipal,
    CreateServicePrincipal,
    ServicePrincipalOut,
)
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import service_json
from millpond.api.texts import Word
from millpond.identity import services
from millpond.identity.services import Change

router = APIRouter(prefix="/v1/service-principals", tags=["service principals"])

Reader = Annotated[Caller, requires("services:read")]
Writer = Annotated[Caller, requires("services:write")]


@router.get(
    "",
    operation_id="list_service_principals",
    responses={200: {"model": Listing[ServicePrincipalOut]}, **failures(401, 403, 422, 503)},
)
async def list_service_principals(
    caller: Reader,
    page: Paged,
    name: Annotated[Word | None, Query(description="Only this name.")] = None,
) -> Response:
    """List service principals, newest first."""
    async with caller.org() as con:
        found, has_more = await services.page(con, caller.org_id, page, name)
    return reply(listing([service_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_service_principal",
    status_code=201,
    openapi_extra=described(CreateServicePrincipal),
    responses={
        201: {"model": ServicePrincipalOut},
        **failures(400, 401, 402, 403, 409, 413, 415, 422, 503),
    },
)
async def create_service_principal(request: Request, caller: Writer) -> Response:
    """Make a service principal; give it an API key to let a program act as it."""
    wish = await read_json(request, CreateServicePrincipal)
    async with caller.org() as con:
        made = await services.create(
            con, caller.principal, wish.name, wish.role, address=caller.address
        )
    headers = {"Location": f"/v1/service-principals/{made.service_id}"}
    return reply(service_json(made), status=201, headers=headers)


@router.get(
    "/{service_id}",
    operation_id="get_service_principal",
    responses={200: {"model": ServicePrincipalOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_service_principal(caller: Reader, service_id: uuid.UUID) -> Response:
    """Show one service principal."""
    async with caller.org() as con:
        return reply(service_json(await services.get(con, caller.org_id, service_id)))


@router.patch(
    "/{service_id}",
    operation_id="change_service_principal",
    openapi_extra=described(ChangeServicePrincipal),
    responses={
        200: {"model": ServicePrincipalOut},
        **failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def change_service_principal(
    request: Request, caller: Writer, service_id: uuid.UUID
) -> Response:
    """Rename a service principal, give it another role, disable or enable it."""
    wish = await read_json(request, ChangeServicePrincipal)
    change = Change(**wish.model_dump(exclude_unset=True))
    async with caller.org() as con:
        changed = await services.change(
            con, caller.principal, service_id, change, address=caller.address
        )
    return reply(service_json(changed))
