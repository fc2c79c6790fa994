"""Invitations: an address is asked to join an org with a role.

Called by the API. Invariants: a token is stored only as a digest, is good once, for one address, until it ends;
nobody gives by it more than they may, when asking and again when it is accepted; an address has one open
invitation of an org.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, Protocol

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.pages import read_page
from millpond.engine.views import PageOf
from millpond.errors import Conflict, Forbidden, InvalidInput, NotFound
from millpond.identity import audit, bearers, holdings, members, organizations
from millpond.identity.addresses import parse_address
from millpond.identity.permissions import OWNER
from millpond.identity.rights import (
    absent,
    check_gives,
    check_role,
    check_signed_in,
    enter_org,
    is_operator_now,
    leave_org,
    permissions_in,
    rights_now,
    role_now,
    take_turn,
)
from millpond.types import NO_ORG, Principal, new_id

_SQL = queries("invitations")
InvitationState = Literal["open", "accepted", "revoked", "expired"]


class Outbox(Protocol):
    """Takes mail in the transaction that it tells of, for sending after the commit."""

    async def invite(self, con: Connection, to: str, subject: str, text: str) -> None:
        """Take one mail."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Mail:
    """How invitations are sent: the outbox, and the address of the page that takes the token."""

    outbox: Outbox
    link: str = "/invitation#token="


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """An invitation without its token."""

    invitation_id: uuid.UUID
    email: str
    role: str
    invited_by: str
    is_of_platform: bool
    created_at: datetime
    sent_at: datetime
    expires_at: datetime
    accepted_at: datetime | None
    accepted_by: str | None
    revoked_at: datetime | None
    state: InvitationState


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The place that an invitation gave."""

    org_id: int
    slug: str
    name: str
    user_id: uuid.UUID
    role: str


async def page(
    con: Connection,
    org_id: int,
    wanted: PageOf,
    state: InvitationState | None = None,
    email: str | None = None,
) -> tuple[list[Invitation], bool]:
    """Return one page of invitations, newest first, and whether more follow."""
    address = None if email is None else email.strip().lower()
    rows, has_more = await read_page(
        con, _SQL["page"], org_id, wanted, "invitation_id", state, address
    )
    return [Invitation(**row) for row in rows], has_more


async def get(con: Connection, org_id: int, invitation_id: uuid.UUID) -> Invitation:
    """Return one invitation; raises NotFound."""
    row = await con.fetchrow(_SQL["get"], org_id, invitation_id)
    if row is None:
        raise absent("invitation", invitation_id, param="invitation_id")
    return Invitation(**row)


async def create(
    con: Connection,
    principal: Principal,
    email: str,
    role: str,
    mail: Mail,
    *,
    address: str | None = None,
) -> Invitation:
    """Ask an address to join; one that was asked before gets this invitation instead.

    Raises InvalidInput, Forbidden for a role above the inviter's rights, Conflict for a member, where the
    inviter may see the members.
    """
    check_signed_in(principal, "Inviting")
    await take_turn(con, principal)
    await check_role(con, principal, role, param="role")
    to = parse_address(email)
    policy = await organizations.policy(con, principal.org_id)
    _check_domain(to, policy.email_domains)
    if principal.may("members:read") and await members.is_member(con, principal.org_id, to):
        raise Conflict(f"{to} is a member already", code="already_member", param="email")
    await _replace_open(con, principal, to)
    return await issue(con, principal, to, role, mail, days=policy.invitation_days, address=address)


async def issue(
    con: Connection,
    principal: Principal,
    to: str,
    role: str,
    mail: Mail,
    *,
    days: int,
    is_of_platform: bool = False,
    address: str | None = None,
) -> Invitation:
    """Store and send an invitation into the principal's org; the caller checked that it may be."""
    text, bearer = bearers.make(bearers.INVITATION, principal.org_id)
    invitation_id = new_id()
    await con.execute(
        _SQL["add"],
        principal.org_id,
        invitation_id,
        to,
        role,
        bearer.digest,
        principal.subject,
        is_of_platform,
        days,
    )
    await holdings.check(con, principal.org_id, "members")
    await _send(con, principal.org_id, to, role, text, mail, days)
    await audit.record(
        con,
        principal,
        "invitation.created",
        f"invitation:{invitation_id}",
        details={"email": to, "role": role},
        address=address,
    )
    return await get(con, principal.org_id, invitation_id)


async def resend(
    con: Connection,
    principal: Principal,
    invitation_id: uuid.UUID,
    mail: Mail,
    *,
    address: str | None = None,
) -> Invitation:
    """Send an invitation again with another token, which ends the former one; who does so answers for it."""
    check_signed_in(principal, "Inviting")
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, invitation_id)
    await check_role(con, principal, seen.role, param="invitation_id")
    policy = await organizations.policy(con, principal.org_id)
    _check_domain(seen.email, policy.email_domains)
    text, bearer = bearers.make(bearers.INVITATION, principal.org_id)
    is_of_platform = False
    renewed = await con.fetchval(
        _SQL["renew"],
        principal.org_id,
        invitation_id,
        bearer.digest,
        principal.subject,
        is_of_platform,
        policy.invitation_days,
    )
    if renewed is None:
        raise _over(seen)
    await holdings.check(con, principal.org_id, "members")
    await _send(con, principal.org_id, seen.email, seen.role, text, mail, policy.invitation_days)
    await audit.record(
        con,
        principal,
        "invitation.resent",
        f"invitation:{invitation_id}",
        details={"email": seen.email, "role": seen.role},
        address=address,
    )
    return await get(con, principal.org_id, invitation_id)


async def revoke(
    con: Connection, principal: Principal, invitation_id: uuid.UUID, *, address: str | None = None
) -> None:
    """Take an invitation back; raises NotFound, Forbidden for one above own rights, Conflict once accepted."""
    await take_turn(con, principal)
    seen = await get(con, principal.org_id, invitation_id)
    if seen.state == "revoked":
        return
    held = await permissions_in(con, principal.org_id, seen.role)
    check_gives(principal, seen.role, held or frozenset(), param="invitation_id")
    if await con.fetchval(_SQL["revoke"], principal.org_id, invitation_id) is None:
        raise _over(seen)
    await audit.record(
        con,
        principal,
        "invitation.revoked",
        f"invitation:{invitation_id}",
        details={"email": seen.email, "role": seen.role},
        address=address,
    )


async def address_of(con: Connection, token: str) -> str:
    """Return whom a token was mailed to, in a transaction that began without an org, and goes on without one.

    Raises NotFound, and Forbidden or InvalidInput where it could not be accepted now.
    """
    bearer = bearers.read(bearers.INVITATION, token)
    if bearer is None:
        raise _not_good()
    await enter_org(con, bearer.org_id)
    found = await con.fetchrow(_SQL["address"], bearer.org_id, bearer.digest)
    if found is None:
        raise _not_good()
    email: str = found["email"]
    org = await organizations.get(con, bearer.org_id)
    await _check_still_given(con, org, email, found)
    await leave_org(con)
    return email


async def accept(
    con: Connection, person: Principal, token: str, *, address: str | None = None
) -> Accepted:
    """Give a signed-in person the place that a token promises, in a transaction that began without an org.

    Raises NotFound for every token that is not good for this person now, Forbidden when the inviter may no
    longer give the role, Conflict for a member.
    """
    assert person.org_id == NO_ORG
    bearer = bearers.read(bearers.INVITATION, token)
    user_id = uuid.UUID(person.subject.removeprefix("user:"))
    email = await con.fetchval(_SQL["account_email"], user_id)
    if bearer is None or email is None:
        raise _not_good()
    await enter_org(con, bearer.org_id)
    await con.execute(queries("rights")["lock"], bearer.org_id)
    found = await con.fetchrow(_SQL["good"], bearer.org_id, bearer.digest, email)
    if found is None:
        raise _not_good()
    org = await organizations.get(con, bearer.org_id)
    await _check_still_given(con, org, email, found)
    await members.add(con, org.org_id, user_id, found["role"], found["invited_by"])
    await con.execute(_SQL["accept"], org.org_id, found["invitation_id"], person.subject)
    await holdings.check(con, org.org_id, "members")
    await audit.record(
        con,
        replace(person, org_id=org.org_id),
        "invitation.accepted",
        f"invitation:{found['invitation_id']}",
        details={"role": found["role"], "invited_by": found["invited_by"]},
        address=address,
    )
    return Accepted(
        org_id=org.org_id, slug=org.slug, name=org.name, user_id=user_id, role=found["role"]
    )


async def _check_still_given(
    con: Connection, org: organizations.Organization, email: str, found: Record
) -> None:
    """Raise unless the org takes the address in, and the inviter may give the role now."""
    if org.suspended_at is not None:
        raise Forbidden("This organization is suspended.", code="org_suspended")
    policy = await organizations.policy(con, org.org_id)
    _check_domain(email, policy.email_domains)
    role, inviter = found["role"], found["invited_by"]
    wanted = await permissions_in(con, org.org_id, role)
    if found["is_of_platform"]:
        is_given = await is_operator_now(con, inviter)
    else:
        held = await rights_now(con, org.org_id, inviter)
        is_given = wanted is not None and wanted | {"members:write"} <= held
        if role == OWNER:
            is_given = is_given and await role_now(con, org.org_id, inviter) == OWNER
    if wanted is None or not is_given:
        raise Forbidden(
            "Who invited you may no longer give this role.",
            code="inviter_rights",
            advice="ask the organization for another invitation",
        )


async def _replace_open(con: Connection, principal: Principal, email: str) -> None:
    """Take back the invitation that an address has already; raises Forbidden for one above own rights."""
    row = await con.fetchrow(_SQL["of_email"], principal.org_id, email)
    if row is not None:
        await revoke(con, principal, row["invitation_id"])


def _check_domain(email: str, domains: Sequence[str]) -> None:
    if domains and email.rpartition("@")[2] not in domains:
        raise InvalidInput(
            "this organization takes only addresses of its own domains",
            code="email_domain",
            param="email",
        )


async def _send(
    con: Connection, org_id: int, to: str, role: str, token: str, mail: Mail, days: int
) -> None:
    org = await organizations.get(con, org_id)
    name = " ".join(org.name.split())
    text = (
        f"You are invited to join {name} as {role}.\n\n"
        f"Sign in (or register) with this address, {to}, and open:\n\n{mail.link}{token}\n\n"
        f"The link is good once, for {days} days. If you expected no invitation, do nothing.\n"
    )
    # What a tenant calls itself stands in the text alone: no header is made of it.
    await mail.outbox.invite(con, to, "You are invited to an organization on Millpond", text)


def _over(seen: Invitation) -> Conflict:
    return Conflict(
        f"invitation {seen.invitation_id} is over: {seen.state}", code="invitation_over"
    )


def _not_good() -> NotFound:
    return NotFound(
        "This invitation is not good for you: it is unknown, used, taken back, expired or meant for "
        "another address.",
        code="invitation_refused",
        param="token",
    )
