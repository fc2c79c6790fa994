"""The platform: its organizations and its operators.

Called by operators. Invariant: nothing here reads what an organization holds.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from millpond.api.auth import Caller, requires_of_platform
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_platform import (
    AddOperator,
    ChangePlatformOrg,
    CreatedOrg,
    CreateOrg,
    OperatorOut,
    PlatformOrgOut,
)
from millpond.api.reply import listing, reply
from millpond.api.routes.invitations import mail_of
from millpond.api.shapes_orgs import invitation_json, operator_json, platform_org_json
from millpond.api.texts import Word
from millpond.errors import InvalidInput
from millpond.identity import organizations, platform
from millpond.identity.platform import OrgsPage
from millpond.types import NO_ORG

router = APIRouter(prefix="/v1/platform", tags=["platform"])

_MOST = 2**63 - 1
OrgId = Annotated[int, Path(ge=1, le=_MOST)]
_Cursor = Annotated[int | None, Query(ge=1, le=_MOST, description="An id of a page.")]


async def _of_platform(caller: Caller) -> Caller:
    return replace(caller, principal=replace(caller.principal, org_id=NO_ORG))


async def _reader(caller: Annotated[Caller, requires_of_platform("platform:read")]) -> Caller:
    return await _of_platform(caller)


async def _writer(caller: Annotated[Caller, requires_of_platform("platform:write")]) -> Caller:
    return await _of_platform(caller)


Reader = Annotated[Caller, Depends(_reader)]
Writer = Annotated[Caller, Depends(_writer)]


async def _paged(
    limit: Annotated[int, Query(ge=1, le=200, description="How many entries at most.")] = 50,
    after: _Cursor = None,
    before: _Cursor = None,
    slug: Annotated[Word | None, Query(description="Only this slug.")] = None,
    is_suspended: Annotated[
        bool | None, Query(description="Only suspended ones, or only others.")
    ] = None,
) -> OrgsPage:
    if after is not None and before is not None:
        raise InvalidInput("give `after` or `before`, not both", param="before")
    return OrgsPage(limit=limit, after=after, before=before, slug=slug, is_suspended=is_suspended)


@router.get(
    "/orgs",
    operation_id="list_orgs",
    responses={200: {"model": Listing[PlatformOrgOut]}, **failures(401, 403, 422, 503)},
)
async def list_orgs(caller: Reader, page: Annotated[OrgsPage, Depends(_paged)]) -> Response:
    """List the platform's organizations, newest first."""
    async with caller.org() as con:
        found, has_more = await platform.page(con, page)
    return reply(listing([platform_org_json(one) for one in found], has_more=has_more))


@router.post(
    "/orgs",
    operation_id="create_org",
    status_code=201,
    openapi_extra=described(CreateOrg),
    responses={201: {"model": CreatedOrg}, **failures(400, 401, 402, 403, 409, 413, 415, 422, 503)},
)
async def create_org(request: Request, caller: Writer) -> Response:
    """Make an organization, and ask its first owner by mail to join."""
    wish = await read_json(request, CreateOrg)
    mail = None if wish.owner_email is None else mail_of(caller.ports)
    async with caller.org() as con:
        made, invitation = await platform.create(
            con,
            caller.principal,
            wish.slug,
            wish.name,
            owner_email=wish.owner_email,
            mail=mail,
            address=caller.address,
        )
    asked = None if invitation is None else invitation_json(invitation)
    headers = {"Location": f"/v1/platform/orgs/{made.org_id}"}
    return reply({**platform_org_json(made), "invitation": asked}, status=201, headers=headers)


@router.get(
    "/orgs/{org_id}",
    operation_id="get_platform_org",
    responses={200: {"model": PlatformOrgOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_platform_org(caller: Reader, org_id: OrgId) -> Response:
    """Show one organization, without anything that it holds."""
    async with caller.org() as con:
        return reply(platform_org_json(await organizations.get(con, org_id)))


@router.patch(
    "/orgs/{org_id}",
    operation_id="change_platform_org",
    openapi_extra=described(ChangePlatformOrg),
    responses={
        200: {"model": PlatformOrgOut},
        **failures(400, 401, 403, 404, 413, 415, 422, 503),
    },
)
async def change_platform_org(request: Request, caller: Writer, org_id: OrgId) -> Response:
    """Rename an organization, suspend it for a reason, or let it go on."""
    wish = await read_json(request, ChangePlatformOrg)
    async with caller.org() as con:
        changed = await platform.change(
            con,
            caller.principal,
            org_id,
            **wish.model_dump(exclude_unset=True),
            address=caller.address,
        )
    return reply(platform_org_json(changed))


@router.get(
    "/operators",
    operation_id="list_operators",
    responses={200: {"model": Listing[OperatorOut]}, **failures(401, 403, 503)},
)
async def list_operators(caller: Reader) -> Response:
    """List the platform's operators, newest account first."""
    async with caller.org() as con:
        found = await platform.operators(con)
    return reply(listing([operator_json(one) for one in found], has_more=False))


@router.post(
    "/operators",
    operation_id="add_operator",
    status_code=201,
    openapi_extra=described(AddOperator),
    responses={201: {"model": OperatorOut}, **failures(400, 401, 403, 413, 415, 422, 503)},
)
async def add_operator(request: Request, caller: Writer) -> Response:
    """Make an account an operator's."""
    wish = await read_json(request, AddOperator)
    async with caller.org() as con:
        added = await platform.add_operator(
            con, caller.principal, wish.email, address=caller.address
        )
    return reply(operator_json(added), status=201)


@router.delete(
    "/operators/{user_id}",
    operation_id="remove_operator",
    status_code=204,
    responses={
        204: {"description": "They are no operator any more."},
        **failures(401, 403, 404, 409, 422, 503),
    },
)
async def remove_operator(caller: Writer, user_id: uuid.UUID) -> Response:
    """Take the operator's right from an account; the last operator stays."""
    async with caller.org() as con:
        await platform.remove_operator(con, caller.principal, user_id, address=caller.address)
    return Response(status_code=204)
