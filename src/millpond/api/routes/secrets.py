"""Secrets: values that flows open, which come in here and go out nowhere.

Called by clients. Invariant: no answer holds a value, nor anything made of one.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_secrets import CreateSecret, PutSecret, SecretName, SecretOut
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_secrets import secret_json
from millpond.api.texts import Word
from millpond.identity import secret_store

router = APIRouter(prefix="/v1/secrets", tags=["secrets"])

Reader = Annotated[Caller, requires("secrets:read")]
Writer = Annotated[Caller, requires("secrets:write")]


@router.get(
    "",
    operation_id="list_secrets",
    responses={200: {"model": Listing[SecretOut]}, **failures(401, 403, 422, 503)},
)
async def list_secrets(
    caller: Reader,
    page: Paged,
    name: Annotated[Word | None, Query(description="Only this name.")] = None,
) -> Response:
    """List secrets, newest first, without their values."""
    async with caller.org() as con:
        found, has_more = await secret_store.page(con, caller.org_id, page, name)
    return reply(listing([secret_json(one) for one in found], has_more=has_more))


@router.post(
    "",
    operation_id="create_secret",
    status_code=201,
    openapi_extra=described(CreateSecret),
    responses={
        201: {"model": SecretOut},
        **failures(400, 401, 402, 403, 409, 413, 415, 422, 503),
    },
)
async def create_secret(request: Request, caller: Writer) -> Response:
    """Store a secret under a new name; its value is never given out again."""
    wish = await read_json(request, CreateSecret)
    async with caller.org() as con:
        made = await secret_store.create(
            con,
            caller.ports.people.ring,
            caller.principal,
            wish.name,
            wish.value.get_secret_value(),
            description=wish.description,
            address=caller.address,
        )
    headers = {"Location": f"/v1/secrets/{made.name}"}
    return reply(secret_json(made), status=201, headers=headers)


@router.get(
    "/{name}",
    operation_id="get_secret",
    responses={200: {"model": SecretOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_secret(caller: Reader, name: SecretName) -> Response:
    """Show one secret, without its value."""
    async with caller.org() as con:
        return reply(secret_json(await secret_store.get(con, caller.org_id, name)))


@router.put(
    "/{name}",
    operation_id="put_secret",
    openapi_extra=described(PutSecret),
    responses={
        200: {"model": SecretOut},
        201: {"model": SecretOut},
        **failures(400, 401, 402, 403, 413, 415, 422, 503),
    },
)
async def put_secret(request: Request, caller: Writer, name: SecretName) -> Response:
    """Store a secret, or replace its value; runs that open it from now on get the new one."""
    wish = await read_json(request, PutSecret)
    async with caller.org() as con:
        made, is_new = await secret_store.put(
            con,
            caller.ports.people.ring,
            caller.principal,
            name,
            wish.value.get_secret_value(),
            description=wish.description,
            address=caller.address,
        )
    headers = {"Location": f"/v1/secrets/{made.name}"} if is_new else None
    return reply(secret_json(made), status=201 if is_new else 200, headers=headers)


@router.delete(
    "/{name}",
    operation_id="delete_secret",
    status_code=204,
    responses={204: {"description": "It is gone."}, **failures(401, 403, 404, 422, 503)},
)
async def delete_secret(caller: Writer, name: SecretName) -> Response:
    """Remove a secret with its value; runs that open it from now on fail."""
    async with caller.org() as con:
        await secret_store.remove(con, caller.principal, name, address=caller.address)
    return Response(status_code=204)
