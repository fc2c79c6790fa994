"""Service principals: programs that act in an org as themselves.

Called by the API in a transaction of the caller. Invariants: none may more than who made or changed it last;
a change makes stale what it was given; none is removed, since runs and the audit log name it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict
from millpond.identity import audit, holdings
from millpond.identity.rights import absent, check_gives, check_role, permissions_in, take_turn
from millpond.types import Principal, new_id

_SQL = queries("services")


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A service principal."""

    service_id: uuid.UUID
    name: str
    role: str
    created_by: str
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What to change of a service principal; None leaves it."""

    name: str | None = None
    role: str | None = None
    is_disabled: bool | None = None


async def page(
    con: Connection, org_id: int, wanted: PageOf, name: str | None = None
) -> tuple[list[Service], bool]:
    """Return one page of service principals, newest first, and whether more follow."""
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "service_id", name)
    return [Service(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, service_id: uuid.UUID) -> Service:
    """Return one service principal; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, service_id)
    if row is None:
        raise absent("service principal", service_id, param="service_id")
    return Service(**row)


async def create(
    con: Connection, principal: Principal, name: str, role: str, *, address: str | None = None
) -> Service:
    """Make a service principal; raises InvalidInput, Forbidden, Conflict for a taken name."""
    await take_turn(con, principal)
    await check_role(con, principal, role, param="role")
    service_id = new_id()
    made = await con.fetchval(
        _SQL["add"], principal.org_id, service_id, name, role, principal.subject
    )
    if made is None:
        raise _taken(name)
    await holdings.check(con, principal.org_id, "service_principals")
    await audit.record(
        con,
        principal,
        "service.created",
        f"service:{service_id}",
        details={"name": name, "role": role},
        address=address,
    )
    return await get(con, principal.org_id, service_id)


async def change(
    con: Connection,
    principal: Principal,
    service_id: uuid.UUID,
    wish: Change,
    *,
    address: str | None = None,
) -> Service:
    """Change a service principal; raises NotFound, InvalidInput, Forbidden, Conflict for a taken name."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, service_id)
    held = await permissions_in(con, principal.org_id, seen.role)
    check_gives(principal, seen.role, held or frozenset(), param="service_id")
    name, role = wish.name or seen.name, wish.role or seen.role
    if role != seen.role:
        await check_role(con, principal, role, param="role")
    if await con.fetchval(_SQL["is_taken"], principal.org_id, service_id, name):
        raise _taken(name)
    was_disabled = seen.disabled_at is not None
    is_disabled = was_disabled if wish.is_disabled is None else wish.is_disabled
    after = {"name": name, "role": role, "is_disabled": is_disabled}
    before = {"name": seen.name, "role": seen.role, "is_disabled": was_disabled}
    if after == before:
        return seen
    await con.execute(_SQL["change"], principal.org_id, service_id, name, role, is_disabled)
    if was_disabled and not is_disabled:
        await holdings.check(con, principal.org_id, "service_principals")
    await audit.record(
        con,
        principal,
        "service.changed",
        f"service:{service_id}",
        details={"from": before, "to": after},
        address=address,
    )
    return await get(con, principal.org_id, service_id)


def _taken(name: str) -> Conflict:
    return Conflict(f"a service principal named {name} exists", code="name_taken", param="name")
