"""Access grants: letting an operator of the platform into the organization for a while.

Called by clients. Invariant: without an open grant, no operator sees anything of an organization.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_orgs import CreateGrant, GrantOut
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import grant_json
from millpond.identity import grants
from millpond.identity.grants import Draft

router = APIRouter(prefix="/v1/grants", tags=["grants"])

Reader = Annotated[Caller, requires("grants:read")]
Writer = Annotated[Caller, requires("grants:write")]


@router.get(
    "",
    operation_id="list_grants",
    responses={200: {"model": Listing[GrantOut]}, **failures(401, 403, 422, 503)},
)
async def list_grants(
    caller: Reader,
    page: Paged,
    only_open: Annotated[bool, Query(description="Leave out those that are over.")] = False,
) -> Response:
    """List access grants, newest first."""
    async with caller.org() as con:
        found, has_more = await grants.page(con, caller.org_id, page, only_open=only_open)
    return reply(listing([grant_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_grant",
    status_code=201,
    openapi_extra=described(CreateGrant),
    responses={201: {"model": GrantOut}, **failures(400, 401, 403, 413, 415, 422, 503)},
)
async def create_grant(request: Request, caller: Writer) -> Response:
    """Let an operator in, who then names the organization with `X-Organization-Id`."""
    wish = await read_json(request, CreateGrant)
    draft = Draft(
        operator_email=wish.operator_email,
        reason=wish.reason,
        hours=wish.hours,
        is_read_only=wish.read_only,
    )
    async with caller.org() as con:
        made = await grants.create(con, caller.principal, draft, address=caller.address)
    headers = {"Location": f"/v1/grants/{made.grant_id}"}
    return reply(grant_json(made), status=201, headers=headers)


@router.get(
    "/{grant_id}",
    operation_id="get_grant",
    responses={200: {"model": GrantOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_grant(caller: Reader, grant_id: uuid.UUID) -> Response:
    """Show one access grant."""
    async with caller.org() as con:
        return reply(grant_json(await grants.get(con, caller.org_id, grant_id)))


@router.delete(
    "/{grant_id}",
    operation_id="end_grant",
    status_code=204,
    responses={
        204: {"description": "The operator is out."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def end_grant(caller: Writer, grant_id: uuid.UUID) -> Response:
    """End an access grant: what the operator asks next is refused."""
    async with caller.org() as con:
        await grants.end(con, caller.principal, grant_id, address=caller.address)
    return Response(status_code=204)
