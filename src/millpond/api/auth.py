"""Who calls and what they may: bearer tokens become principals, routes declare permissions.

Called by every route through `requires`. Invariant: a route without it is on the public list of the
tests, or they fail.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from millpond.api.ports import Ports
from millpond.errors import Forbidden, Unauthenticated
from millpond.types import Principal

PUBLIC = frozenset({"/healthz", "/readyz", "/openapi.json", "/.well-known/jwks.json"})

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    bearerFormat="JWT",
    description="A token of this installation: `millpond token` prints one for development.",
)


class Requires:
    """The dependency of a route on one permission; returns the principal that holds it."""

    def __init__(self, permission: str) -> None:
        self.permission = permission

    async def __call__(
        self,
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    ) -> Principal:
        """Return who calls; raises Unauthenticated or Forbidden."""
        if credentials is None:
            raise Unauthenticated(
                "This needs a bearer token.",
                code="token_missing",
                advice="send the header `Authorization: Bearer <token>`",
            )
        principal = await _verified(request.app.state.ports, credentials.credentials)
        permit(principal, self.permission)
        return principal


def requires(permission: str) -> Any:
    """Declare that a route needs `permission`; gives the route its principal."""
    return Depends(Requires(permission))


def permit(principal: Principal, permission: str) -> None:
    """Raise Forbidden unless the principal holds `permission`."""
    if not principal.may(permission):
        raise Forbidden(
            f"This needs the permission {permission}, which your token does not have.",
            code="permission_missing",
            param=permission,
            advice="ask for a token with this permission",
        )


async def _verified(ports: Ports, token: str) -> Principal:
    """Verify a token; one signed with an unknown key is tried again after a look for new keys."""
    try:
        return ports.keyring.verify(token)
    except Unauthenticated as error:
        if error.code != "token_unknown_key" or not await ports.keyring.refresh():
            raise
    return ports.keyring.verify(token)
