"""Who calls and what they may: bearer tokens become principals, routes declare permissions.

Called by every route through `requires` or `signed_in`. Invariant: a route without a permission is on `PUBLIC` or
`SIGNED_IN`, or the tests fail.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from millpond.api.ports import Ports
from millpond.api.rates import RateLimited
from millpond.db.pool import Connection
from millpond.errors import Forbidden, Transient, Unauthenticated
from millpond.identity import audit
from millpond.identity.gate import Wish
from millpond.identity.passport import ORG_HEADER
from millpond.identity.sessions import Device
from millpond.types import Json, Principal

PUBLIC = frozenset(
    {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/.well-known/jwks.json",
        "/v1/auth/sign-in",
        "/v1/auth/refresh",
        "/v1/auth/sign-out",
        "/v1/auth/register",
        "/v1/auth/register/confirm",
        "/v1/auth/password-reset",
        "/v1/auth/password-reset/confirm",
        "/v1/auth/operator",
    }
)
# Routes about the caller alone: they need a good token and no permission.
SIGNED_IN = frozenset(
    {
        "/v1/me",
        "/v1/me/sessions",
        "/v1/me/sessions/{session_id}",
        "/v1/me/password",
        "/v1/auth/invitations/accept",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls, and what the route works with on their behalf."""

    principal: Principal
    ports: Ports
    address: str | None = None
    expires_at: float | None = None

    @property
    def org_id(self) -> int:
        """The org of the caller's token: the only one that exists for this request."""
        return self.principal.org_id

    def org(self, *, is_snapshot: bool = False) -> AbstractAsyncContextManager[Connection, None]:
        """Open a transaction in the caller's org; it is refused once the caller's rights have changed."""
        return self.ports.db.of(self.principal, is_snapshot=is_snapshot)

    async def tell(
        self,
        con: Connection,
        action: str,
        resource: str,
        *,
        details: Mapping[str, Json] | None = None,
        run_id: uuid.UUID | None = None,
    ) -> None:
        """Write a row of the audit log in the transaction of the deed that it tells of."""
        await audit.record(
            con,
            self.principal,
            action,
            resource,
            details=details,
            run_id=run_id,
            address=self.address,
        )

    async def is_over(self) -> str | None:
        """Return why the caller may see no more of an open stream, None while it may: the code of an error."""
        if self.expires_at is not None and time.time() >= self.expires_at:
            return "token_expired"
        if self.principal.standing is None:
            return None
        try:
            async with self.org():
                return None
        except (Unauthenticated, Forbidden) as error:
            return error.code
        except Transient:
            return None

    @property
    def session_id(self) -> uuid.UUID | None:
        """The session of a signed-in person."""
        standing = self.principal.standing
        return standing.session_id if standing is not None else None

    @property
    def user_id(self) -> uuid.UUID | None:
        """Who is signed in; None for keys, services, outside identities and tokens made on the machine."""
        kind, _, name = self.principal.subject.partition(":")
        return uuid.UUID(name) if kind == "user" and self.session_id is not None else None

    @property
    def person_id(self) -> uuid.UUID:
        """Who is signed in; raises Forbidden for whoever is no person with a session."""
        if self.user_id is None:
            raise Forbidden(
                "This is for people who are signed in.",
                code="session_needed",
                advice="sign in with `POST /v1/auth/sign-in`",
            )
        return self.user_id


class _Bearer(HTTPBearer):
    """The scheme of every route that is not public."""

    def __init__(self) -> None:
        super().__init__(
            bearerFormat="JWT",
            scheme_name="bearer",
            description="An access token of this installation, an API key, or a token of a registered "
            "issuer. One that spans several organizations is sent with `X-Organization-Id`.",
        )

    def text(self, request: Request) -> str:
        """Return the token of a request; raises Unauthenticated without one."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(
                "This needs a bearer token.",
                code="token_missing",
                advice="send the header `Authorization: Bearer <token>`",
            )
        return token.strip()


class Requires(_Bearer):
    """The dependency of a route on one permission; gives it its caller.

    One class for scheme and check, since each further dependency costs every request.
    """

    def __init__(self, permission: str, *, is_of_platform: bool = False) -> None:
        super().__init__()
        self.permission = permission
        self.is_of_platform = is_of_platform

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Return who calls; raises Unauthenticated or Forbidden."""
        token = self.text(request)
        ports: Ports = request.app.state.ports
        wish = Wish(org=_org(request), is_of_platform=self.is_of_platform)
        principal = await ports.gate.admit(token, wish)
        await _admit(request, ports, principal)
        permit(principal, self.permission)
        return Caller(
            principal=principal,
            ports=ports,
            address=_address(request),
            expires_at=ports.gate.expires_at(token),
        )


class SignedIn(_Bearer):
    """The dependency of a route about the caller alone: no permission, and no org for a person."""

    def __init__(self, *, is_person: bool) -> None:
        super().__init__()
        self.is_person = is_person

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Return who calls; raises Unauthenticated, or Forbidden where a person is needed."""
        token = self.text(request)
        ports: Ports = request.app.state.ports
        principal = await ports.gate.anybody(token, _org(request))
        await _admit(request, ports, principal)
        caller = Caller(principal=principal, ports=ports, address=_address(request))
        if self.is_person:
            assert caller.person_id
        return caller


def requires(permission: str) -> Any:
    """Declare that a route needs `permission`; gives the route its `Caller`."""
    return Depends(Requires(permission))


def requires_of_platform(permission: str) -> Any:
    """Declare that a route of the platform itself needs `permission`; its `Caller` has no org."""
    return Depends(Requires(permission, is_of_platform=True))


def signed_in(*, is_person: bool = True) -> Any:
    """Declare that a route needs whoever calls and no permission; its `Caller` is of the platform if a person."""
    return Depends(SignedIn(is_person=is_person))


def device_of(request: Request) -> Device:
    """Return where a request comes from."""
    return Device(address=_address(request), agent=request.headers.get("user-agent"))


async def _admit(request: Request, ports: Ports, principal: Principal) -> None:
    """Let a request of a known caller through, or raise RateLimited; the answer tells how many are left."""
    limits = await ports.reserver.limits_if_any(principal.org_id)
    if not limits:
        return
    try:
        request.state.more_headers = await ports.rates.admit(principal, limits)
    except RateLimited as error:
        request.state.more_headers = error.headers
        raise


def _org(request: Request) -> str | None:
    return request.headers.get(ORG_HEADER.lower(), "").strip() or None


def _address(request: Request) -> str | None:
    return request.client.host if request.client is not None else None


def permit(principal: Principal, permission: str, *, param: str | None = None) -> None:
    """Raise Forbidden unless the principal holds `permission`; `param` is the field that asks for it."""
    if not principal.may(permission):
        raise Forbidden(
            f"This needs the permission {permission}, which your token does not have.",
            code="permission_missing",
            param=param or permission,
            advice="ask for a token with this permission",
        )
