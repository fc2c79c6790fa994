"""Secrets of organizations: stored sealed, replaced, removed, and listed without their values.

Called by the API in a transaction of the caller. Invariants: a value is sealed before it reaches the database, bound to
its org, its id and its key; nothing here gives one out; every change is audited without it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import features
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict, NotFound
from millpond.identity import audit, holdings
from millpond.identity.ring import KeyRing
from millpond.types import Principal, new_id

_SQL = queries("secrets")
_PURPOSE = "secret"


@dataclass(frozen=True, kw_only=True, slots=True)
class Secret:
    """What may be told of a secret; `version` counts its values, `used_at` is right to a minute."""

    secret_id: uuid.UUID
    name: str
    description: str
    version: int
    created_by: str
    created_at: datetime
    changed_by: str
    changed_at: datetime
    used_at: datetime | None


def bound_to(org_id: int, secret_id: uuid.UUID | str) -> tuple[str, str, str]:
    """Return the words that a value is sealed with, besides the id of its key."""
    return _PURPOSE, str(org_id), str(secret_id)


async def page(
    con: Connection, org_id: int, wanted: PageOf, name: str | None = None
) -> tuple[list[Secret], bool]:
    """Return one page of secrets, newest first, and whether more follow."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "secret_id", name)
    return [Secret(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, name: str) -> Secret:
    """Return one secret; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, name)
    if row is None:
        raise _absent(name)
    return Secret(**row)


async def create(
    con: Connection,
    ring: KeyRing,
    principal: Principal,
    name: str,
    value: str,
    *,
    description: str = "",
    address: str | None = None,
) -> Secret:
    """Store a secret under a new name; raises Conflict for a taken one."""
    if not await _added(con, ring, principal, name, value, description, address):
        raise Conflict(
            f"a secret named {name} exists",
            code="name_taken",
            param="name",
            advice="PUT /v1/secrets/{name} replaces its value",
        )
    return await get(con, principal.org_id, name)


async def put(
    con: Connection,
    ring: KeyRing,
    principal: Principal,
    name: str,
    value: str,
    *,
    description: str | None = None,
    address: str | None = None,
) -> tuple[Secret, bool]:
    """Store or replace the value of a secret; returns it, and whether it is new.

    Without a `description` that of before stays.
    """
    org_id = principal.org_id
    while (row := await con.fetchrow(_SQL["lock"], org_id, name)) is None:
        if await _added(con, ring, principal, name, value, description or "", address):
            return await get(con, org_id, name), True
    await features.check(con, org_id, "secrets")
    secret_id = row["secret_id"]
    seal = await ring.current(con)
    sealed = seal.seal(value.encode(), *bound_to(org_id, secret_id))
    told = row["description"] if description is None else description
    await con.execute(
        _SQL["replace"], org_id, secret_id, sealed, seal.key_id, told, principal.subject
    )
    changed = await get(con, org_id, name)
    await _tell(con, principal, "secret.changed", changed, address)
    return changed, False


async def remove(
    con: Connection, principal: Principal, name: str, *, address: str | None = None
) -> None:
    """Remove a secret with its value; raises NotFound."""
    secret_id = await con.fetchval(_SQL["remove"], principal.org_id, name)
    if secret_id is None:
        raise _absent(name)
    await audit.record(
        con,
        principal,
        "secret.removed",
        f"secret:{secret_id}",
        details={"name": name},
        address=address,
    )


async def _added(
    con: Connection,
    ring: KeyRing,
    principal: Principal,
    name: str,
    value: str,
    description: str,
    address: str | None,
) -> bool:
    """Store a new secret; returns False where the name is taken."""
    secret_id, seal = new_id(), await ring.current(con)
    sealed = seal.seal(value.encode(), *bound_to(principal.org_id, secret_id))
    made = await con.fetchval(
        _SQL["add"],
        principal.org_id,
        secret_id,
        name,
        description,
        sealed,
        seal.key_id,
        principal.subject,
    )
    if made is None:
        return False
    await holdings.check(con, principal.org_id, "secrets")
    added = await get(con, principal.org_id, name)
    await _tell(con, principal, "secret.created", added, address)
    return True


async def _tell(
    con: Connection, principal: Principal, action: str, secret: Secret, address: str | None
) -> None:
    await audit.record(
        con,
        principal,
        action,
        f"secret:{secret.secret_id}",
        details={"name": secret.name, "version": secret.version},
        address=address,
    )


def _absent(name: str) -> NotFound:
    return NotFound(f"there is no secret named {name}", code="secret_not_found", param="name")
