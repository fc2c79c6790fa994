"""Me: who calls, what they may, their sessions and password.

Called by clients; a signed-in person needs no org for it. Invariant: nobody reads or changes anybody but themselves.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from millpond.api.auth import Caller, device_of, signed_in
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models import Listing
from millpond.api.models_people import ChangeMe, ChangePassword, MeOut, SessionOut, SignedInOut
from millpond.api.reply import listing, reply
from millpond.api.shapes_people import seat_json, session_json, signed_in_json, user_json
from millpond.db.pool import Connection
from millpond.identity import accounts, sessions
from millpond.identity.passport import ORG_HEADER, not_in_org
from millpond.identity.people import Place, account_by_id, places_of

router = APIRouter(prefix="/v1/me", tags=["me"])
Anybody = Annotated[Caller, signed_in(is_person=False)]
Person = Annotated[Caller, signed_in()]
_REFUSALS = (400, 401, 403, 413, 415, 422, 503)


@router.get(
    "", operation_id="get_me", responses={200: {"model": MeOut}, **failures(401, 403, 422, 503)}
)
async def get_me(request: Request, caller: Anybody) -> Response:
    """Show who calls, in which orgs they are, and what they may in the one that the request names."""
    async with caller.org() as con:
        return reply(await _me(con, caller, request.headers.get(ORG_HEADER.lower())))


async def _me(con: Connection, caller: Caller, wanted: str | None) -> dict[str, Any]:
    principal = caller.principal
    user_id = caller.user_id
    if user_id is None:
        return {
            "object": "me",
            "subject": principal.subject,
            "user": None,
            "session_id": None,
            "organization": principal.org_id or None,
            "role": None,
            "permissions": sorted(principal.permissions),
            "organizations": [],
        }
    account = await account_by_id(con, user_id)
    places = await places_of(con, user_id)
    place = _wanted(places, wanted)
    permissions = principal.permissions | (place.seat.permissions if place else frozenset())
    return {
        "object": "me",
        "subject": principal.subject,
        "user": user_json(account),
        "session_id": caller.session_id,
        "organization": place.seat.org_id if place else None,
        "role": place.seat.role if place else None,
        "permissions": sorted(permissions),
        "organizations": [seat_json(one) for one in places],
    }


def _wanted(places: list[Place], wanted: str | None) -> Place | None:
    if not wanted:
        return places[0] if len(places) == 1 else None
    for place in places:
        if wanted.strip() in (str(place.seat.org_id), place.seat.slug):
            return place
    raise not_in_org()


@router.patch(
    "",
    operation_id="change_me",
    openapi_extra=described(ChangeMe),
    responses={200: {"model": MeOut}, **failures(*_REFUSALS)},
)
async def change_me(request: Request, caller: Person) -> Response:
    """Change one's own name."""
    wish = await read_json(request, ChangeMe)
    await accounts.rename(caller.ports.people, caller.principal, wish.name)
    async with caller.org() as con:
        return reply(await _me(con, caller, request.headers.get(ORG_HEADER.lower())))


@router.get(
    "/sessions",
    operation_id="list_my_sessions",
    responses={200: {"model": Listing[SessionOut]}, **failures(401, 403, 503)},
)
async def list_my_sessions(caller: Person) -> Response:
    """List one's own live sessions, newest first."""
    async with caller.org() as con:
        found = await sessions.list_sessions(con, caller.person_id)
    shown = [session_json(one, caller.session_id) for one in found]
    return reply(listing(shown, has_more=False))


@router.delete(
    "/sessions/{session_id}",
    operation_id="revoke_my_session",
    status_code=204,
    responses=failures(401, 403, 404, 422, 503),
)
async def revoke_my_session(request: Request, caller: Person, session_id: uuid.UUID) -> Response:
    """End one of one's own sessions; its access token is refused from the next request on."""
    async with caller.org() as con:
        await sessions.revoke_session(con, caller.person_id, session_id, device_of(request))
    return Response(status_code=204)


@router.post(
    "/password",
    operation_id="change_my_password",
    openapi_extra=described(ChangePassword),
    responses={200: {"model": SignedInOut}, **failures(429, *_REFUSALS)},
)
async def change_my_password(request: Request, caller: Person) -> Response:
    """Change one's own password: the other sessions end, this one gets new tokens."""
    wish = await read_json(request, ChangePassword)
    renewed = await accounts.change_password(
        caller.ports.people,
        caller.principal,
        wish.old_password,
        wish.new_password,
        device_of(request),
    )
    return reply(signed_in_json(renewed), headers={"Cache-Control": "no-store"})
