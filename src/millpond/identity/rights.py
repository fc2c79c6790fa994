"""Rights: who may give what to whom, and what somebody may now.

Called by the rooms that change who may do what. Invariants: nobody gives, changes or takes away more than they
may themselves; only owners touch owners; such changes happen one after the other in an org, each by somebody
whose own rights still held when its turn came.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import Forbidden, InvalidInput, NotFound
from millpond.identity.permissions import OWNER, ROLES, permissions_of
from millpond.types import Principal

_SQL = queries("rights")
_HOLDERS = {"user": "of_user", "service": "of_service", "outside": "of_outside"}


async def take_turn(con: Connection, principal: Principal) -> None:
    """Wait until nobody else changes rights in the principal's org; raises when its own changed meanwhile."""
    await con.execute(_SQL["lock"], principal.org_id)
    await refuse_stale(con, principal)


async def refuse_stale(con: Connection, principal: Principal) -> None:
    """Raise when the rights of who acts changed since the transaction began."""
    standing = principal.standing
    if standing is not None:
        await con.execute(
            _SQL["refuse_stale"],
            principal.subject,
            standing.stamp,
            standing.session_id,
            standing.grant_id,
        )


def exceeding(principal: Principal, permissions: Collection[str]) -> list[str]:
    """Return which of the permissions the principal does not hold, in order."""
    return sorted(one for one in permissions if not principal.may(one))


def check_within(principal: Principal, permissions: Collection[str], *, param: str) -> None:
    """Raise Forbidden when the permissions are more than the principal's own."""
    missing = exceeding(principal, permissions)
    if missing:
        raise Forbidden(
            f"This is more than you may yourself: {', '.join(missing[:5])}.",
            code="above_own_rights",
            param=param,
        )


def is_owner(principal: Principal) -> bool:
    """Whether the principal acts as an owner, with all that owners may."""
    return OWNER in principal.roles and not exceeding(principal, ROLES[OWNER])


async def check_role(con: Connection, principal: Principal, role: str, *, param: str) -> None:
    """Raise unless `role` exists and the principal may give and take it."""
    permissions = await permissions_in(con, principal.org_id, role)
    if permissions is None:
        raise InvalidInput(
            f"there is no role {role}",
            code="role_unknown",
            param=param,
            advice="`GET /v1/roles` lists them",
        )
    check_gives(principal, role, permissions, param=param)


def check_gives(
    principal: Principal, role: str, permissions: Collection[str], *, param: str
) -> None:
    """Raise Forbidden unless the principal may give a role, or take it from somebody."""
    if role == OWNER and not is_owner(principal):
        raise Forbidden("Only an owner may do this to an owner.", code="owners_only", param=param)
    check_within(principal, permissions, param=param)


async def permissions_in(con: Connection, org_id: int, role: str) -> frozenset[str] | None:
    """Return what a role may in an org, built-in or custom; None when there is no such role."""
    if role in ROLES:
        return ROLES[role]
    custom = await con.fetchval(_SQL["custom_role"], org_id, role)
    return None if custom is None else permissions_of(role, custom)


async def rights_now(con: Connection, org_id: int, subject: str) -> frozenset[str]:
    """Return what a subject may in an org now: nothing once it is gone, disabled, revoked or expired.

    A subject without an id is of a token made on the machine itself, of which nothing is known after.
    """
    kind, _, text = subject.partition(":")
    holder_id = _id(text)
    if holder_id is None:
        return frozenset()
    if kind == "key":
        row = await con.fetchrow(_SQL["of_key"], org_id, holder_id)
        if row is None:
            return frozenset()
        return frozenset(row["scopes"]) & await rights_now(con, org_id, row["owner"])
    if kind not in _HOLDERS:
        return frozenset()
    row = await con.fetchrow(_SQL[_HOLDERS[kind]], org_id, holder_id)
    return frozenset() if row is None else permissions_of(row["role"], row["permissions"])


async def role_now(con: Connection, org_id: int, subject: str) -> str | None:
    """Return the role of a user, service or outside identity now; of a key, its owner's."""
    kind, _, text = subject.partition(":")
    holder_id = _id(text)
    if holder_id is None:
        return None
    if kind == "key":
        row = await con.fetchrow(_SQL["of_key"], org_id, holder_id)
        return None if row is None else await role_now(con, org_id, row["owner"])
    if kind not in _HOLDERS:
        return None
    row = await con.fetchrow(_SQL[_HOLDERS[kind]], org_id, holder_id)
    return None if row is None else str(row["role"])


async def is_operator_now(con: Connection, subject: str) -> bool:
    """Whether a subject is an operator of the platform now."""
    kind, _, text = subject.partition(":")
    holder_id = _id(text)
    if kind != "user" or holder_id is None:
        return False
    return bool(await con.fetchval(_SQL["is_operator"], holder_id))


async def enter_org(con: Connection, org_id: int) -> None:
    """Set the org of the rest of a transaction that began without one, as those who are in none do."""
    await con.execute(_SQL["enter_org"], org_id)


async def leave_org(con: Connection) -> None:
    """Let the rest of a transaction that entered an org go on as it began: accounts are changed there alone."""
    await con.execute(_SQL["leave_org"])


def check_signed_in(principal: Principal, what: str) -> None:
    """Raise Forbidden for a token made on the machine itself: what it gives could not be asked for again."""
    if principal.standing is None:
        raise Forbidden(
            f"{what} needs somebody whose rights can be asked for later: sign in, or use an API key.",
            code="standing_needed",
        )


def absent(what: str, key: object, *, param: str) -> NotFound:
    """Make the answer for a thing that this org does not have."""
    return NotFound(f"{what} {key} does not exist", param=param)


def _id(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None
