"""Who calls and what they may: bearer tokens become principals, routes declare permissions.

Called by every route through `requires`. Invariant: a route without it is on the public list of the
tests, or they fail.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from millpond.api.ports import Ports
from millpond.db.pool import Connection
from millpond.errors import Forbidden, Unauthenticated
from millpond.identity.gate import Wish
from millpond.identity.passport import ORG_HEADER
from millpond.types import NO_ORG, Principal

# Routes that need somebody who is signed in, in whatever org or none.
SIGNED_IN = frozenset({"/v1/auth/invitations/accept"})
_BEARER = (
    "An access token of this installation, an API key, or a token of a registered issuer. "
    "One that spans several organizations is sent with `X-Organization-Id`."
)
PUBLIC = frozenset({"/healthz", "/readyz", "/openapi.json", "/.well-known/jwks.json"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls, and what the route works with on their behalf."""

    principal: Principal
    ports: Ports
    address: str | None = None

    @property
    def org_id(self) -> int:
        """The org of the caller's token: the only one that exists for this request."""
        return self.principal.org_id

    def org(self, *, is_snapshot: bool = False) -> AbstractAsyncContextManager[Connection]:
        """Open a transaction in the caller's org; it is refused once the caller's rights have changed."""
        return self.ports.db.of(self.principal, is_snapshot=is_snapshot)


class Requires(HTTPBearer):
    """The dependency of a route on one permission; gives it its caller.

    One class for scheme and check, since each further dependency costs every request.
    """

    def __init__(self, permission: str, *, is_of_platform: bool = False) -> None:
        super().__init__(
            bearerFormat="JWT",
            scheme_name="bearer",
            description=_BEARER,
        )
        self.permission = permission
        self.is_of_platform = is_of_platform

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Return who calls; raises Unauthenticated or Forbidden."""
        token = _bearer(request)
        ports: Ports = request.app.state.ports
        wish = Wish(
            org=request.headers.get(ORG_HEADER.lower(), "").strip() or None,
            is_of_platform=self.is_of_platform,
        )
        principal = await ports.gate.admit(token, wish)
        permit(principal, self.permission)
        return Caller(principal=principal, ports=ports, address=_address(request))


class SignedIn(HTTPBearer):
    """The dependency of a route on a signed-in person, who may be in no org; its caller has none."""

    def __init__(self) -> None:
        super().__init__(bearerFormat="JWT", scheme_name="bearer", description=_BEARER)

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Return who calls; raises Unauthenticated or Forbidden."""
        ports: Ports = request.app.state.ports
        principal = await ports.gate.anybody(_bearer(request), None)
        if principal.org_id != NO_ORG:
            raise Forbidden("This is for people who are signed in.", code="person_needed")
        return Caller(principal=principal, ports=ports, address=_address(request))


def signed_in() -> Any:
    """Declare that a route needs a person with a session, and no permission in an org."""
    return Depends(SignedIn())


def requires(permission: str) -> Any:
    """Declare that a route needs `permission`; gives the route its `Caller`."""
    return Depends(Requires(permission))


def requires_of_platform(permission: str) -> Any:
    """Declare that a route of the platform itself needs `permission`; its `Caller` has no org."""
    return Depends(Requires(permission, is_of_platform=True))


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated(
            "This needs a bearer token.",
            code="token_missing",
            advice="send the header `Authorization: Bearer <token>`",
        )
    return token.strip()


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
