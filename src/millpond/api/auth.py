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
from millpond.errors import Forbidden, Transient, Unauthenticated
from millpond.types import Principal

PUBLIC = frozenset({"/healthz", "/readyz", "/openapi.json", "/.well-known/jwks.json"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls, and what the route works with on their behalf."""

    principal: Principal
    ports: Ports

    @property
    def org_id(self) -> int:
        """The org of the caller's token: the only one that exists for this request."""
        return self.principal.org_id

    def org(self) -> AbstractAsyncContextManager[Connection]:
        """Open a transaction in the caller's org."""
        return self.ports.db.org(self.principal.org_id)


class Requires(HTTPBearer):
    """The dependency of a route on one permission; gives it its caller.

    One class for scheme and check, since each further dependency costs every request.
    """

    def __init__(self, permission: str) -> None:
        super().__init__(
            bearerFormat="JWT",
            scheme_name="bearer",
            description="A token of this installation: `millpond token` prints one for development.",
        )
        self.permission = permission

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        """Return who calls; raises Unauthenticated or Forbidden."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(
                "This needs a bearer token.",
                code="token_missing",
                advice="send the header `Authorization: Bearer <token>`",
            )
        ports: Ports = request.app.state.ports
        principal = await _verified(ports, token.strip())
        permit(principal, self.permission)
        return Caller(principal=principal, ports=ports)


# A key that was taken away is refused after a minute; through an outage, after ten.
_KEYS_FOR_S = 60.0
_KEYS_AT_MOST_S = 600.0


def requires(permission: str) -> Any:
    """Declare that a route needs `permission`; gives the route its `Caller`."""
    return Depends(Requires(permission))


def permit(principal: Principal, permission: str, *, param: str | None = None) -> None:
    """Raise Forbidden unless the principal holds `permission`; `param` is the field that asks for it."""
    if not principal.may(permission):
        raise Forbidden(
            f"This needs the permission {permission}, which your token does not have.",
            code="permission_missing",
            param=param or permission,
            advice="ask for a token with this permission",
        )


async def _verified(ports: Ports, token: str) -> Principal:
    """Verify a token; keys are read again once a minute, and for a token signed with an unknown one."""
    keyring = ports.keyring
    if keyring.age_s > _KEYS_FOR_S:
        try:
            await keyring.refresh()
        except Transient:
            if keyring.age_s > _KEYS_AT_MOST_S:
                raise
    try:
        return keyring.verify(token)
    except Unauthenticated as error:
        if error.code != "token_unknown_key":
            raise
    await keyring.refresh()
    return keyring.verify(token)
