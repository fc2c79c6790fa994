"""Invitations: asking addresses to join, and joining.

Called by clients. Invariant: a token is in the mail and nowhere else.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from millpond.api.auth import Caller, requires, signed_in
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_orgs import (
    AcceptedInvitation,
    AcceptInvitation,
    CreateInvitation,
    InvitationOut,
    InvitationState,
)
from millpond.api.paging import Paged
from millpond.api.ports import Ports
from millpond.api.reply import listing, reply
from millpond.api.shapes_orgs import invitation_json
from millpond.api.texts import LongWord
from millpond.errors import Conflict
from millpond.identity import invitations
from millpond.identity.invitations import Mail

router = APIRouter(prefix="/v1", tags=["invitations"])

Reader = Annotated[Caller, requires("members:read")]
Writer = Annotated[Caller, requires("members:write")]
Person = Annotated[Caller, signed_in()]


@router.get(
    "/invitations",
    operation_id="list_invitations",
    responses={200: {"model": Listing[InvitationOut]}, **failures(401, 403, 422, 503)},
)
async def list_invitations(
    caller: Reader,
    page: Paged,
    state: Annotated[InvitationState | None, Query(description="Only in this state.")] = None,
    email: Annotated[LongWord | None, Query(description="Only of this address.")] = None,
) -> Response:
    """List invitations, newest first."""
    async with caller.org() as con:
        found, has_more = await invitations.page(con, caller.org_id, page, state, email)
    return reply(listing([invitation_json(one) for one in found], has_more=has_more))


@router.post(
    "/invitations",
    operation_id="create_invitation",
    status_code=201,
    openapi_extra=described(CreateInvitation),
    responses={
        201: {"model": InvitationOut},
        **failures(400, 401, 402, 403, 409, 413, 415, 422, 503),
    },
)
async def create_invitation(request: Request, caller: Writer) -> Response:
    """Ask an address by mail to join; takes the place of an open invitation of that address."""
    wish = await read_json(request, CreateInvitation)
    mail = mail_of(caller.ports)
    async with caller.org() as con:
        made = await invitations.create(
            con, caller.principal, wish.email, wish.role, mail, address=caller.address
        )
    headers = {"Location": f"/v1/invitations/{made.invitation_id}"}
    return reply(invitation_json(made), status=201, headers=headers)


@router.get(
    "/invitations/{invitation_id}",
    operation_id="get_invitation",
    responses={200: {"model": InvitationOut}, **failures(401, 403, 404, 422, 503)},
)
async def get_invitation(caller: Reader, invitation_id: uuid.UUID) -> Response:
    """Show one invitation."""
    async with caller.org() as con:
        return reply(invitation_json(await invitations.get(con, caller.org_id, invitation_id)))


@router.post(
    "/invitations/{invitation_id}/resend",
    operation_id="resend_invitation",
    responses={200: {"model": InvitationOut}, **failures(401, 402, 403, 404, 409, 422, 503)},
)
async def resend_invitation(caller: Writer, invitation_id: uuid.UUID) -> Response:
    """Send an invitation again with another token; the former one is good no more."""
    mail = mail_of(caller.ports)
    async with caller.org() as con:
        sent = await invitations.resend(
            con, caller.principal, invitation_id, mail, address=caller.address
        )
    return reply(invitation_json(sent))


@router.delete(
    "/invitations/{invitation_id}",
    operation_id="revoke_invitation",
    status_code=204,
    responses={
        204: {"description": "It cannot be accepted any more."},
        **failures(401, 403, 404, 409, 422, 503),
    },
)
async def revoke_invitation(caller: Writer, invitation_id: uuid.UUID) -> Response:
    """Take an invitation back."""
    async with caller.org() as con:
        await invitations.revoke(con, caller.principal, invitation_id, address=caller.address)
    return Response(status_code=204)


@router.post(
    "/auth/invitations/accept",
    operation_id="accept_invitation",
    openapi_extra=described(AcceptInvitation),
    responses={
        200: {"model": AcceptedInvitation},
        **failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def accept_invitation(request: Request, caller: Person) -> Response:
    """Join an organization, signed in with the address that was invited; refresh the token after."""
    wish = await read_json(request, AcceptInvitation)
    async with caller.org() as con:
        place = await invitations.accept(con, caller.principal, wish.token, address=caller.address)
    return reply(
        {
            "object": "accepted_invitation",
            "organization_id": place.org_id,
            "slug": place.slug,
            "name": place.name,
            "role": place.role,
        }
    )


def mail_of(ports: Ports) -> Mail:
    """Return how mail is sent; raises Conflict where the installation sends none."""
    if ports.mail is None:
        raise Conflict(
            "This installation sends no mail, so nobody can be invited.",
            code="mail_unset",
            advice="ask the operator of this installation to set up mail",
        )
    return ports.mail
