"""Members: who is in an org, with which role.

Called by the API in a transaction of the caller. Invariants: an org keeps an owner who can sign in; another role
makes stale what was signed for the old one; what somebody had here is over when they leave, also if they come back;
every change is audited.
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
from millpond.identity import api_keys, audit
from millpond.identity.permissions import OWNER
from millpond.identity.rights import absent, check_gives, check_role, permissions_in, take_turn
from millpond.types import Principal

_SQL = queries("members")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A person in an org; `disabled_at` is of the account."""

    user_id: uuid.UUID
    email: str
    name: str
    role: str
    added_by: str
    created_at: datetime
    disabled_at: datetime | None


async def page(
    con: Connection, org_id: int, wanted: PageOf, role: str | None = None, email: str | None = None
) -> tuple[list[Member], bool]:
    """Return one page of members, newest account first, and whether more follow."""
    address = None if email is None else email.strip().lower()
    rows, has_more = await read_page(con, _SQL["page"], org_id, wanted, "user_id", role, address)
    return [Member(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, user_id: uuid.UUID) -> Member:
    """Return one member; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, user_id)
    if row is None:
        raise absent("member", user_id, param="user_id")
    return Member(**row)


async def is_member(con: Connection, org_id: int, email: str) -> bool:
    """Whether somebody with this address is in the org."""
    return bool(await con.fetchval(_SQL["of_email"], org_id, email))


async def add(con: Connection, org_id: int, user_id: uuid.UUID, role: str, added_by: str) -> None:
    """Give an account a place in the org; raises Conflict when it has one."""
    if await con.fetchval(_SQL["add"], org_id, user_id, role, added_by) is None:
        raise Conflict("You are in this organization already.", code="already_member")


async def change_role(
    con: Connection,
    principal: Principal,
    user_id: uuid.UUID,
    role: str,
    *,
    address: str | None = None,
) -> Member:
    """Give a member another role; raises NotFound, Forbidden, InvalidInput, Conflict for the last owner."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, user_id)
    if seen.role == role:
        return seen
    await _check_touches(con, principal, seen)
    await check_role(con, principal, role, param="role")
    await _check_owner_stays(con, principal.org_id, seen)
    await con.execute(_SQL["change_role"], principal.org_id, user_id, role)
    await audit.record(
        con,
        principal,
        "member.role_changed",
        f"user:{user_id}",
        details={"from": seen.role, "to": role},
        address=address,
    )
    return await get(con, principal.org_id, user_id)


async def remove(
    con: Connection, principal: Principal, user_id: uuid.UUID, *, address: str | None = None
) -> None:
    """Take a member out with their keys, or let somebody leave.

    Raises NotFound, Forbidden, Conflict for the last owner.
    """
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, user_id)
    if not is_self(principal, user_id):
        await _check_touches(con, principal, seen)
    await _check_owner_stays(con, principal.org_id, seen)
    await con.execute(_SQL["remove"], principal.org_id, user_id)
    action = "member.left" if is_self(principal, user_id) else "member.removed"
    details = {"role": seen.role}
    await audit.record(con, principal, action, f"user:{user_id}", details=details, address=address)
    await api_keys.revoke_of(con, principal, f"user:{user_id}", action, address=address)


def is_self(principal: Principal, user_id: uuid.UUID) -> bool:
    """Whether a signed-in person is this member."""
    return principal.standing is not None and principal.subject == f"user:{user_id}"


async def _check_touches(con: Connection, principal: Principal, seen: Member) -> None:
    """Raise Forbidden when a member may more than the principal."""
    held = await permissions_in(con, principal.org_id, seen.role)
    check_gives(principal, seen.role, held or frozenset(), param="user_id")


async def _check_owner_stays(con: Connection, org_id: int, seen: Member) -> None:
    if seen.role != OWNER or seen.disabled_at is not None:
        return
    if not await con.fetchval(_SQL["other_owners"], org_id, seen.user_id):
        raise Conflict(
            "An organization keeps one owner: this is the last one.",
            code="last_owner",
            param="user_id",
            advice="make somebody else an owner first",
        )
