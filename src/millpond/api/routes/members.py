"""Members: who is in the organization, with which role.

Called by clients. Invariant: who may leave needs no right over others.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, permit, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_orgs import ChangeMember, MemberOut
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import member_json
from millpond.api.texts import LongWord, Word
from millpond.identity import members

router = APIRouter(prefix="/v1/members", tags=["members"])

Reader = Annotated[Caller, requires("members:read")]
Writer = Annotated[Caller, requires("members:write")]


@router.get(
    "",
    operation_id="list_members",
    responses={200: {"model": Listing[MemberOut]}, **failures(401, 403, 422, 503)},
)
async def list_members(
    caller: Reader,
    page: Paged,
    role: Annotated[Word | None, Query(description="Only of this role.")] = None,
    email: Annotated[LongWord | None, Query(description="Only with this address.")] = None,
) -> Response:
    """List the organization's members, newest account first."""
    async with caller.org() as con:
        found, has_more = await members.page(con, caller.org_id, page, role, email)
    return reply(listing([member_json(one) for one in found], has_more=has_more))


@router.get(
    "/{user_id}",
    operation_id="get_member",
    responses={200: {"model": MemberOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_member(caller: Reader, user_id: uuid.UUID) -> Response:
    """Show one member."""
    async with caller.org() as con:
        return reply(member_json(await members.get(con, caller.org_id, user_id)))


@router.patch(
    "/{user_id}",
    operation_id="change_member",
    openapi_extra=described(ChangeMember),
    responses={
        200: {"model": MemberOut},
        **failures(400, 401, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def change_member(request: Request, caller: Writer, user_id: uuid.UUID) -> Response:
    """Give a member another role; tokens of the old one are refused from then on."""
    wish = await read_json(request, ChangeMember)
    async with caller.org() as con:
        changed = await members.change_role(
            con, caller.principal, user_id, wish.role, address=caller.address
        )
    return reply(member_json(changed))


@router.delete(
    "/{user_id}",
    operation_id="remove_member",
    status_code=204,
    responses={
        204: {"description": "They are in the organization no more."},
        **failures(401, 403, 404, 409, 422, 503),
    },
)
async def remove_member(caller: Reader, user_id: uuid.UUID) -> Response:
    """Take a member out of the organization, which needs `members:write` too; or leave it oneself."""
    if not members.is_self(caller.principal, user_id):
        permit(caller.principal, "members:write")
    async with caller.org() as con:
        await members.remove(con, caller.principal, user_id, address=caller.address)
    return Response(status_code=204)
