"""Roles: the built-in ones, and those that the organization named itself.

Called by clients. Invariant: built-in roles stay as they are.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models_orgs import PutRole, RoleListing, RoleOut
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import role_json
from millpond.api.texts import Word
from millpond.identity import roles
from millpond.identity.permissions import PERMISSIONS, PLATFORM

router = APIRouter(prefix="/v1/roles", tags=["roles"])

Reader = Annotated[Caller, requires("roles:read")]
Writer = Annotated[Caller, requires("roles:write")]
_TABLE = {name: what for name, what in PERMISSIONS.items() if name not in PLATFORM}


@router.get(
    "",
    operation_id="list_roles",
    responses={200: {"model": RoleListing}, **failures(401, 403, 503)},
)
async def list_roles(caller: Reader) -> Response:
    """List all roles with their permissions, and what each permission allows."""
    async with caller.org() as con:
        found = await roles.list_roles(con, caller.org_id)
    page = listing([role_json(one) for one in found], has_more=False)
    return reply({**page, "permissions": _TABLE})


@router.put(
    "/{name}",
    operation_id="put_role",
    openapi_extra=described(PutRole),
    responses={200: {"model": RoleOut}, **failures(400, 401, 402, 403, 409, 413, 415, 422, 503)},
)
async def put_role(request: Request, caller: Writer, name: Word) -> Response:
    """Make or replace a custom role; tokens of those who hold it are refused until they are refreshed."""
    wish = await read_json(request, PutRole)
    async with caller.org() as con:
        made = await roles.put(
            con,
            caller.principal,
            name,
            wish.description,
            wish.permissions,
            address=caller.address,
        )
    return reply(role_json(made))


@router.delete(
    "/{name}",
    operation_id="delete_role",
    status_code=204,
    responses={
        204: {"description": "It is gone."},
        **failures(401, 403, 404, 409, 422, 503),
    },
)
async def delete_role(caller: Writer, name: Word) -> Response:
    """Remove a custom role that nobody holds."""
    async with caller.org() as con:
        await roles.delete(con, caller.principal, name, address=caller.address)
    return Response(status_code=204)
