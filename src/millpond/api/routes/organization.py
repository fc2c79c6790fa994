"""The caller's organization: its name and its policy.

Called by clients. Invariant: which org it is comes from the token alone.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models_orgs import ChangeOrg, OrgOut
from millpond.api.reply import reply
from millpond.api.shapes_orgs import org_json
from millpond.db.pool import Connection
from millpond.identity import organizations

router = APIRouter(prefix="/v1/org", tags=["organization"])

Reader = Annotated[Caller, requires("org:read")]
Writer = Annotated[Caller, requires("org:write")]


@router.get(
    "",
    operation_id="get_org",
    responses={200: {"model": OrgOut}, **failures(401, 403, 503)},
)
async def get_org(caller: Reader) -> Response:
    """Show the caller's organization with its policy."""
    async with caller.org() as con:
        return await _shown(con, caller.org_id)


@router.patch(
    "",
    operation_id="change_org",
    openapi_extra=described(ChangeOrg),
    responses={200: {"model": OrgOut}, **failures(400, 401, 403, 413, 415, 422, 503)},
)
async def change_org(request: Request, caller: Writer) -> Response:
    """Rename the organization or change its policy; what is left out stays."""
    wish = await read_json(request, ChangeOrg)
    given = wish.model_dump(exclude_unset=True)
    async with caller.org() as con:
        await organizations.change(
            con,
            caller.principal,
            name=given.get("name"),
            policy_changes=given.get("policy"),
            address=caller.address,
        )
        return await _shown(con, caller.org_id)


async def _shown(con: Connection, org_id: int) -> Response:
    org = await organizations.get(con, org_id)
    return reply(org_json(org, await organizations.policy(con, org_id)))
