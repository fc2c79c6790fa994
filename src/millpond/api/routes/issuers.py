"""Outside issuers: whose tokens the organization accepts, and whom they vouch for.

Called by clients. Invariant: no transaction is open while an issuer is asked.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_issuers import (
    ChangeIdentity,
    ChangeIssuer,
    CreateIssuer,
    IssuerOut,
    IssuerTest,
    OutsideIdentityOut,
    RuleIn,
)
from millpond.api.paging import Paged
from millpond.api.reply import listing, reply
from millpond.api.shapes_issuers import identity_json, issuer_json, test_json
from millpond.api.texts import Word
from millpond.errors import InvalidInput, Unavailable
from millpond.identity import issuers, outside_identities
from millpond.identity.claims import Rule
from millpond.identity.issuers import Terms

router = APIRouter(prefix="/v1", tags=["outside issuers"])

Reader = Annotated[Caller, requires("issuers:read")]
Writer = Annotated[Caller, requires("issuers:write")]


@router.get(
    "/issuers",
    operation_id="list_issuers",
    responses={200: {"model": Listing[IssuerOut]}, **failures(401, 403, 422, 503)},
)
async def list_issuers(
    caller: Reader,
    page: Paged,
    url: Annotated[Word | None, Query(description="Only at this address.")] = None,
) -> Response:
    """List outside issuers, newest first."""
    async with caller.org() as con:
        found, has_more = await issuers.page(con, caller.org_id, page, url)
    return reply(listing([issuer_json(one) for one in found], has_more=has_more))


@router.post(
    "/issuers",
    operation_id="create_issuer",
    status_code=201,
    openapi_extra=described(CreateIssuer),
    responses={201: {"model": IssuerOut}, **failures(400, 401, 402, 403, 409, 413, 415, 422, 503)},
)
async def create_issuer(request: Request, caller: Writer) -> Response:
    """Accept the tokens of an issuer, by OpenID Connect Discovery; it is not asked for anything yet."""
    wish = await read_json(request, CreateIssuer)
    _check_address(caller, wish.url)
    terms = Terms(**_terms(wish.model_dump(exclude={"url"}), wish.rules))
    async with caller.org() as con:
        made = await issuers.create(con, caller.principal, wish.url, terms, address=caller.address)
    headers = {"Location": f"/v1/issuers/{made.issuer_id}"}
    return reply(issuer_json(made), status=201, headers=headers)


@router.get(
    "/issuers/{issuer_id}",
    operation_id="get_issuer",
    responses={200: {"model": IssuerOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_issuer(caller: Reader, issuer_id: uuid.UUID) -> Response:
    """Show one outside issuer."""
    async with caller.org() as con:
        return reply(issuer_json(await issuers.get(con, caller.org_id, issuer_id)))


@router.patch(
    "/issuers/{issuer_id}",
    operation_id="change_issuer",
    openapi_extra=described(ChangeIssuer),
    responses={200: {"model": IssuerOut}, **failures(400, 401, 402, 403, 404, 413, 415, 422, 503)},
)
async def change_issuer(request: Request, caller: Writer, issuer_id: uuid.UUID) -> Response:
    """Change what an issuer's tokens may, disable or enable it; open streams of its identities end."""
    wish = await read_json(request, ChangeIssuer)
    change = _terms(wish.model_dump(exclude_unset=True), wish.rules)
    async with caller.org() as con:
        changed = await issuers.change(
            con, caller.principal, issuer_id, change, address=caller.address
        )
    return reply(issuer_json(changed))


@router.delete(
    "/issuers/{issuer_id}",
    operation_id="remove_issuer",
    status_code=204,
    responses={
        204: {"description": "Its tokens are refused from now on, and its identities may nothing."},
        **failures(401, 403, 404, 422, 503),
    },
)
async def remove_issuer(caller: Writer, issuer_id: uuid.UUID) -> Response:
    """Accept an issuer's tokens no more."""
    async with caller.org() as con:
        await issuers.remove(con, caller.principal, issuer_id, address=caller.address)
    return Response(status_code=204)


@router.post(
    "/issuers/{issuer_id}/test",
    operation_id="test_issuer",
    responses={200: {"model": IssuerTest}, **failures(401, 403, 404, 422, 503)},
)
async def test_issuer(caller: Writer, issuer_id: uuid.UUID) -> Response:
    """Ask an issuer for its keys now, at most every 10 s, and tell what came of it."""
    async with caller.org() as con:
        issuer = await issuers.get(con, caller.org_id, issuer_id)
    try:
        keys = await caller.ports.outside.keys.test(issuer.url, org_id=caller.org_id)
    except Unavailable as failure:
        return reply(test_json({}, failure))
    return reply(test_json(keys, None))


@router.get(
    "/outside-identities",
    operation_id="list_outside_identities",
    responses={200: {"model": Listing[OutsideIdentityOut]}, **failures(401, 403, 422, 503)},
)
async def list_outside_identities(
    caller: Reader,
    page: Paged,
    issuer: Annotated[Word | None, Query(description="Only of the issuer at this address.")] = None,
) -> Response:
    """List whom outside issuers vouched for, newest first."""
    async with caller.org() as con:
        found, has_more = await outside_identities.page(con, caller.org_id, page, issuer)
    return reply(listing([identity_json(one) for one in found], has_more=has_more))


@router.get(
    "/outside-identities/{identity_id}",
    operation_id="get_outside_identity",
    responses={200: {"model": OutsideIdentityOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_outside_identity(caller: Reader, identity_id: uuid.UUID) -> Response:
    """Show one outside identity."""
    async with caller.org() as con:
        return reply(identity_json(await outside_identities.get(con, caller.org_id, identity_id)))


@router.patch(
    "/outside-identities/{identity_id}",
    operation_id="change_outside_identity",
    openapi_extra=described(ChangeIdentity),
    responses={
        200: {"model": OutsideIdentityOut},
        **failures(400, 401, 403, 404, 413, 415, 422, 503),
    },
)
async def change_outside_identity(
    request: Request, caller: Writer, identity_id: uuid.UUID
) -> Response:
    """Disable or enable an outside identity; disabled, its tokens and runs may nothing more."""
    wish = await read_json(request, ChangeIdentity)
    async with caller.org() as con:
        changed = await outside_identities.disable(
            con, caller.principal, identity_id, wish.is_disabled, address=caller.address
        )
    return reply(identity_json(changed))


def _check_address(caller: Caller, url: str) -> None:
    outside = caller.ports.outside
    if url == outside.own:
        raise InvalidInput("this installation is no outside issuer", param="url")
    if "?" in url or "#" in url:
        raise InvalidInput("an issuer's address has no query and no fragment", param="url")
    outside.keys.web.check(url, param="url")


def _terms(fields: dict[str, Any], rules: list[RuleIn] | None) -> dict[str, Any]:
    """Return members of an issuer's terms as the room of issuers takes them."""
    if "rules" in fields and rules is not None:
        fields["rules"] = [
            Rule(claim=one.claim, values=tuple(one.values), role=one.role) for one in rules
        ]
    return fields
