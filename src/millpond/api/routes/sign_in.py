"""Signing in and out, registration, reset, and the first operator.

Called by people who have no token yet, so every route here is public. Invariant: no answer tells whether an address has
an account.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from millpond.api.auth import device_of
from millpond.api.bodies import described, read_json
from millpond.api.documented import failures
from millpond.api.models_people import (
    ClaimOperator,
    ConfirmRegistration,
    ConfirmReset,
    CreatedUser,
    MailedOut,
    Refresh,
    Register,
    RequestReset,
    SignedInOut,
    SignIn,
)
from millpond.api.ports import Wired
from millpond.api.reply import reply
from millpond.api.shapes_people import signed_in_json
from millpond.identity import accounts, operators, sign_in

router = APIRouter(prefix="/v1/auth", tags=["sign-in"])
_REFUSALS = (400, 413, 415, 422, 429, 503)
_NO_STORE = {"Cache-Control": "no-store"}
_MAX_BYTES = 16 * 1024


@router.post(
    "/sign-in",
    operation_id="sign_in",
    openapi_extra=described(SignIn),
    responses={200: {"model": SignedInOut}, **failures(401, *_REFUSALS)},
)
async def sign_in_(request: Request, ports: Wired) -> Response:
    """Open a session by email and password."""
    wish = await read_json(request, SignIn, max_bytes=_MAX_BYTES)
    device = device_of(request)
    signed_in = await sign_in.sign_in(ports.people, wish.email, wish.password, device)
    return reply(signed_in_json(signed_in), headers=_NO_STORE)


@router.post(
    "/refresh",
    operation_id="refresh_session",
    openapi_extra=described(Refresh),
    responses={200: {"model": SignedInOut}, **failures(401, *_REFUSALS)},
)
async def refresh(request: Request, ports: Wired) -> Response:
    """Trade a refresh token for the next one and a new access token; a second use of one ends its session."""
    wish = await read_json(request, Refresh, max_bytes=_MAX_BYTES)
    signed_in = await sign_in.refresh(ports.people, wish.refresh_token, device_of(request))
    return reply(signed_in_json(signed_in), headers=_NO_STORE)


@router.post(
    "/sign-out",
    operation_id="sign_out",
    status_code=204,
    openapi_extra=described(Refresh),
    responses=failures(*_REFUSALS),
)
async def sign_out(request: Request, ports: Wired) -> Response:
    """End the session of a refresh token; one that is unknown or over is no error."""
    wish = await read_json(request, Refresh, max_bytes=_MAX_BYTES)
    await sign_in.sign_out(ports.people, wish.refresh_token, device_of(request))
    return Response(status_code=204)


@router.post(
    "/register",
    operation_id="register_account",
    status_code=202,
    openapi_extra=described(Register),
    responses={202: {"model": MailedOut}, **failures(403, *_REFUSALS)},
)
async def register(request: Request, ports: Wired) -> Response:
    """Ask for an account, where the installation lets anybody; a mailed link makes it."""
    wish = await read_json(request, Register, max_bytes=_MAX_BYTES)
    await accounts.register(ports.people, wish.email, wish.name, device_of(request))
    return _mailed()


@router.post(
    "/register/confirm",
    operation_id="confirm_registration",
    status_code=201,
    openapi_extra=described(ConfirmRegistration),
    responses={201: {"model": CreatedUser}, **failures(403, 404, 409, *_REFUSALS)},
)
async def confirm_registration(request: Request, ports: Wired) -> Response:
    """Make the account of a mailed link or invitation, with a password."""
    wish = await read_json(request, ConfirmRegistration, max_bytes=_MAX_BYTES)
    user_id = await accounts.confirm_registration(
        ports.people, wish.token, wish.password, device_of(request)
    )
    return reply({"id": user_id, "object": "created_user"}, status=201)


@router.post(
    "/password-reset",
    operation_id="request_password_reset",
    status_code=202,
    openapi_extra=described(RequestReset),
    responses={202: {"model": MailedOut}, **failures(*_REFUSALS)},
)
async def request_password_reset(request: Request, ports: Wired) -> Response:
    """Ask for a link that sets a new password; it is mailed if there is an account."""
    wish = await read_json(request, RequestReset, max_bytes=_MAX_BYTES)
    await accounts.request_reset(ports.people, wish.email, device_of(request))
    return _mailed()


@router.post(
    "/password-reset/confirm",
    operation_id="confirm_password_reset",
    status_code=204,
    openapi_extra=described(ConfirmReset),
    responses=failures(*_REFUSALS),
)
async def confirm_password_reset(request: Request, ports: Wired) -> Response:
    """Set a new password by a mailed link; all sessions end."""
    wish = await read_json(request, ConfirmReset, max_bytes=_MAX_BYTES)
    await accounts.confirm_reset(ports.people, wish.token, wish.password, device_of(request))
    return Response(status_code=204)


@router.post(
    "/operator",
    operation_id="claim_operator",
    status_code=201,
    openapi_extra=described(ClaimOperator),
    responses={201: {"model": CreatedUser}, **failures(409, *_REFUSALS)},
)
async def claim_operator(request: Request, ports: Wired) -> Response:
    """Make the operator's account by the single-use link that `millpond operator` printed."""
    wish = await read_json(request, ClaimOperator, max_bytes=_MAX_BYTES)
    user_id = await operators.claim(
        ports.people, wish.token, wish.email, wish.name, wish.password, device_of(request)
    )
    return reply({"id": user_id, "object": "created_user"}, status=201)


def _mailed() -> Response:
    detail = "If that can be done, a mail is on its way to the address."
    return reply({"object": "mailed", "detail": detail}, status=202)
