"""API keys: what programs send instead of signing in.

Called by clients. Invariant: the text of a key is in the answer that made it and nowhere else.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_orgs import ApiKeyOut, CreateApiKey, NewApiKey
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import key_json
from millpond.api.texts import Word
from millpond.identity import api_keys
from millpond.identity.api_keys import Draft

router = APIRouter(prefix="/v1/api-keys", tags=["API keys"])

Reader = Annotated[Caller, requires("keys:read")]
Writer = Annotated[Caller, requires("keys:write")]


@router.get(
    "",
    operation_id="list_api_keys",
    responses={200: {"model": Listing[ApiKeyOut]}, **failures(401, 403, 422, 503)},
)
async def list_api_keys(
    caller: Reader,
    page: Paged,
    owner: Annotated[Word | None, Query(description="Only of this subject.")] = None,
    only_good: Annotated[bool, Query(description="Leave out revoked and expired ones.")] = False,
) -> Response:
    """List API keys without their secrets, newest first."""
    async with caller.org() as con:
        found, has_more = await api_keys.page(
            con, caller.org_id, page, owner=owner, only_good=only_good
        )
    return reply(listing([key_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_api_key",
    status_code=201,
    openapi_extra=described(CreateApiKey),
    responses={201: {"model": NewApiKey}, **failures(400, 401, 402, 403, 413, 415, 422, 503)},
)
async def create_api_key(request: Request, caller: Writer) -> Response:
    """Make an API key for oneself or a service principal; its text is in this answer and never again."""
    wish = await read_json(request, CreateApiKey)
    async with caller.org() as con:
        made, text = await api_keys.create(
            con, caller.principal, Draft(**wish.model_dump()), address=caller.address
        )
    headers = {"Location": f"/v1/api-keys/{made.key_id}", "Cache-Control": "no-store"}
    return reply({**key_json(made), "key": text}, status=201, headers=headers)


@router.get(
    "/{key_id}",
    operation_id="get_api_key",
    responses={200: {"model": ApiKeyOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_api_key(caller: Reader, key_id: uuid.UUID) -> Response:
    """Show one API key without its secret."""
    async with caller.org() as con:
        return reply(key_json(await api_keys.get(con, caller.org_id, key_id)))


@router.delete(
    "/{key_id}",
    operation_id="revoke_api_key",
    status_code=204,
    responses={
        204: {"description": "It is refused from now on."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def revoke_api_key(caller: Writer, key_id: uuid.UUID) -> Response:
    """Revoke an API key; the list still shows it."""
    async with caller.org() as con:
        await api_keys.revoke(con, caller.principal, key_id, address=caller.address)
    return Response(status_code=204)
