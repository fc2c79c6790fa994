"""Roles of an org: the built-in ones and those it named itself.

Called by the API in a transaction of the caller. Invariants: a custom role has no built-in one's name and never
more than who changed it last may; a change makes stale what was signed for those who hold it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import features
from millpond.errors import Conflict, InvalidInput
from millpond.identity import audit, holdings
from millpond.identity.permissions import ROLES, check_permissions, permissions_of
from millpond.identity.rights import absent, check_within, take_turn
from millpond.types import Principal

_SQL = queries("roles")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
# Members carry the permissions of theirs in each token, and every list shows all.
MAX_ROLES = 100
_DESCRIPTIONS = {
    "owner": "May everything in the organization, and lets operators in.",
    "admin": "Runs the organization; touches no owner and lets no operator in.",
    "builder": "Builds flows, knowledge, schedules and triggers.",
    "analyst": "Starts runs and sees their results.",
    "support": "Answers questions to humans.",
    "viewer": "Looks.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A role: a named set of permissions."""

    name: str
    is_built_in: bool
    description: str
    permissions: frozenset[str]
    created_at: datetime | None = None


def built_in() -> list[Role]:
    """Return the built-in roles, from the most to the least powerful."""
    return [
        Role(name=name, is_built_in=True, description=_DESCRIPTIONS[name], permissions=held)
        for name, held in ROLES.items()
    ]


async def list_roles(con: Connection, org_id: int) -> list[Role]:
    """Return all roles: built-in ones by power, then the org's own by name."""
    return [*built_in(), *[_role(row) for row in await con.fetch(_SQL["list"], org_id)]]


async def put(
    con: Connection,
    principal: Principal,
    name: str,
    description: str,
    permissions: Collection[str],
    *,
    address: str | None = None,
) -> Role:
    """Make or replace a custom role; raises InvalidInput, Conflict for a built-in's name, Forbidden."""
    _check_name(name)
    wanted = check_permissions(permissions, param="permissions")
    check_within(principal, wanted, param="permissions")
    await take_turn(con, principal)
    seen = await _find(con, principal.org_id, name)
    if seen is not None:
        check_within(principal, seen.permissions, param="name")
    elif await con.fetchval(_SQL["count"], principal.org_id) >= MAX_ROLES:
        raise Conflict(f"an organization has {MAX_ROLES} roles at most", code="too_many_roles")
    await con.execute(_SQL["put"], principal.org_id, name, description, sorted(wanted))
    if seen is None:
        await holdings.check(con, principal.org_id, "custom_roles")
    else:
        await features.check(con, principal.org_id, "custom_roles")
    if seen is not None and seen.permissions != wanted:
        await _make_stale(con, principal.org_id, name)
    await audit.record(
        con,
        principal,
        "role.created" if seen is None else "role.changed",
        f"role:{name}",
        details={
            "from": None if seen is None else sorted(seen.permissions),
            "to": sorted(wanted),
        },
        address=address,
    )
    made = await _find(con, principal.org_id, name)
    assert made is not None
    return made


async def delete(
    con: Connection, principal: Principal, name: str, *, address: str | None = None
) -> None:
    """Remove a custom role; raises NotFound, Conflict while somebody holds it, Forbidden."""
    _check_name(name)
    await take_turn(con, principal)
    seen = await _find(con, principal.org_id, name)
    if seen is None:
        raise absent("role", name, param="name")
    check_within(principal, seen.permissions, param="name")
    holders = await con.fetchval(_SQL["holders"], principal.org_id, name)
    if holders:
        raise Conflict(
            f"the role {name} is held by {holders}",
            code="role_in_use",
            param="name",
            advice="give its members, service principals, issuers and open invitations another role first",
        )
    await con.execute(_SQL["delete"], principal.org_id, name)
    await audit.record(con, principal, "role.deleted", f"role:{name}", address=address)


async def _find(con: Connection, org_id: int, name: str) -> Role | None:
    row = await con.fetchrow(_SQL["get"], org_id, name)
    return None if row is None else _role(row)


async def _make_stale(con: Connection, org_id: int, name: str) -> None:
    for holders in ("members", "services", "outside"):
        await con.execute(_SQL[f"bump_{holders}"], org_id, name)


def _check_name(name: str) -> None:
    if name in ROLES:
        raise Conflict(
            f"{name} is a built-in role and stays as it is", code="role_built_in", param="name"
        )
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "a role's name is lower-case letters, digits, `_` and `-`, beginning with a letter",
            param="name",
        )


def _role(row: Record) -> Role:
    return Role(
        name=row["role"],
        is_built_in=False,
        description=row["description"],
        permissions=permissions_of(row["role"], row["permissions"]),
        created_at=row["created_at"],
    )
