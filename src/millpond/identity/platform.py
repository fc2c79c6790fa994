"""The platform: its orgs and its operators.

Called by the API for operators, in a transaction without an org. Invariants: an operator sees and changes nothing
of what an org holds; one operator who can sign in stays; each deed stands in the platform's own log.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import pauses
from millpond.errors import Conflict, InvalidInput
from millpond.identity import audit, grants, invitations, organizations
from millpond.identity.addresses import parse_address
from millpond.identity.invitations import Invitation, Mail
from millpond.identity.organizations import Organization, Policy
from millpond.identity.orgs import check_slug
from millpond.identity.permissions import OWNER
from millpond.identity.rights import absent, check_signed_in, enter_org, refuse_stale
from millpond.types import NO_ORG, Principal

# Who holds the work of a suspended org: it stands queued, and goes on when that ends.
SUSPENSION = "platform:suspension"
_SQL = queries("organizations")
_HIGHEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class OrgsPage:
    """Which part of the list of orgs, newest first, and of which."""

    limit: int = 50
    after: int | None = None
    before: int | None = None
    slug: str | None = None
    is_suspended: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """Who works on the platform itself."""

    user_id: uuid.UUID
    email: str
    name: str
    created_at: datetime
    disabled_at: datetime | None


async def page(con: Connection, wanted: OrgsPage) -> tuple[list[Organization], bool]:
    """Return one page of orgs, newest first, and whether more follow."""
    rows = await con.fetch(
        _SQL["page"],
        _HIGHEST if wanted.after is None else wanted.after,
        wanted.before,
        wanted.limit + 1,
        wanted.slug,
        wanted.is_suspended,
    )
    found = [Organization(**row) for row in rows[: wanted.limit]]
    found.sort(key=lambda one: one.org_id, reverse=True)
    return found, len(rows) > wanted.limit


async def create(
    con: Connection,
    operator: Principal,
    slug: str,
    name: str,
    *,
    owner_email: str | None = None,
    mail: Mail | None = None,
    address: str | None = None,
) -> tuple[Organization, Invitation | None]:
    """Make an org, and ask its first owner to join where an address is given.

    Raises InvalidInput, Conflict for a taken slug.
    """
    assert operator.org_id == NO_ORG
    check_slug(slug)
    if owner_email is not None:
        check_signed_in(operator, "Inviting an owner")
    org_id = await con.fetchval(_SQL["add"], slug, name)
    if org_id is None:
        raise Conflict(f"an organization {slug} exists", code="slug_taken", param="slug")
    details = {"slug": slug, "name": name}
    resource = f"org:{org_id}"
    await audit.record(con, operator, "org.created", resource, details=details, address=address)
    made = await organizations.get(con, org_id)
    if owner_email is None or mail is None:
        return made, None
    await enter_org(con, org_id)
    invitation = await invitations.issue(
        con,
        replace(operator, org_id=org_id),
        parse_address(owner_email),
        OWNER,
        mail,
        days=Policy().invitation_days,
        is_of_platform=True,
        address=address,
    )
    return made, invitation


async def change(
    con: Connection,
    operator: Principal,
    org_id: int,
    *,
    name: str | None = None,
    is_suspended: bool | None = None,
    reason: str | None = None,
    address: str | None = None,
) -> Organization:
    """Rename an org, suspend it for a reason, or let it go on; raises NotFound, InvalidInput."""
    seen = await organizations.get(con, org_id)
    if is_suspended and not reason:
        raise InvalidInput("suspending needs a reason", param="reason")
    if reason and not is_suspended:
        raise InvalidInput("a reason is of a suspension", param="reason")
    resource = f"org:{org_id}"
    if name is not None and name != seen.name:
        await con.execute(_SQL["rename"], org_id, name)
        names = {"from": seen.name, "to": name}
        await audit.record(con, operator, "org.renamed", resource, details=names, address=address)
    if is_suspended:
        await con.execute(_SQL["suspend"], org_id, reason)
        await enter_org(con, org_id)
        await pauses.pause(con, org_id, pauses.Scope(), SUSPENSION, "the organization is suspended")
        why = {"reason": reason}
        await audit.record(con, operator, "org.suspended", resource, details=why, address=address)
    elif is_suspended is False and seen.suspended_at is not None:
        await con.execute(_SQL["unsuspend"], org_id)
        await enter_org(con, org_id)
        held = await pauses.list_pauses(con, org_id)
        if any(one.paused_by == SUSPENSION for one in held):  # a pause of its own stays
            await pauses.resume(con, org_id, pauses.Scope())
        await audit.record(con, operator, "org.unsuspended", resource, address=address)
    return await organizations.get(con, org_id)


async def operators(con: Connection) -> list[Operator]:
    """Return all operators, newest account first."""
    return [Operator(**row) for row in await con.fetch(_SQL["operators"])]


async def add_operator(
    con: Connection, operator: Principal, email: str, *, address: str | None = None
) -> Operator:
    """Make an account an operator's; raises InvalidInput when there is no account of that address."""
    await _take_turn(con, operator)
    found = await con.fetchrow(_SQL["account_of"], parse_address(email))
    if found is None:
        raise InvalidInput(
            "there is no account of this address",
            code="account_unknown",
            param="email",
            advice="let them register first",
        )
    user_id = found["user_id"]
    is_operator = True
    if await con.fetchval(_SQL["set_operator"], user_id, is_operator) is not None:
        await audit.record(con, operator, "operator.added", f"user:{user_id}", address=address)
    return await _operator(con, user_id)


async def remove_operator(
    con: Connection, operator: Principal, user_id: uuid.UUID, *, address: str | None = None
) -> None:
    """Take the operator's right from an account, with all grants; raises NotFound, Conflict for the last one."""
    await _take_turn(con, operator)
    await _operator(con, user_id)
    if not await con.fetchval(_SQL["other_operators"], user_id):
        raise Conflict(
            "The platform keeps one operator: this is the last one.",
            code="last_operator",
            param="user_id",
            advice="make somebody else an operator first",
        )
    is_operator = False
    await con.fetchval(_SQL["set_operator"], user_id, is_operator)
    await audit.record(con, operator, "operator.removed", f"user:{user_id}", address=address)
    await grants.end_all_of(con, operator, user_id, address=address)


async def _take_turn(con: Connection, operator: Principal) -> None:
    """Wait until nobody else changes operators; raises when this one's own right changed meanwhile."""
    await con.execute(_SQL["lock_operators"])
    await refuse_stale(con, operator)


async def _operator(con: Connection, user_id: uuid.UUID) -> Operator:
    row = await con.fetchrow(_SQL["operator"], user_id)
    if row is None:
        raise absent("operator", user_id, param="user_id")
    return Operator(**row)
