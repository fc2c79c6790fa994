"""Accounts: made, confirmed by mail, their passwords changed and reset.

Called by the routes, and by whoever makes an account for somebody invited. Invariants: whether an address has an
account is told to nobody but by mail to that address; a new password ends the sessions that stood on the old one.
"""

from __future__ import annotations

import uuid

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import Conflict, Forbidden, InvalidInput, Unauthenticated
from millpond.identity import audit, bearers, invitations, letters, sessions
from millpond.identity.addresses import parse_address
from millpond.identity.brake import ADDRESS, MAIL, PAIR, brake, key_of
from millpond.identity.mailing import post
from millpond.identity.passwords import check_password
from millpond.identity.people import People, SignedIn, account_of, admitted
from millpond.identity.sessions import Device, person
from millpond.identity.single_use import issue, spend
from millpond.types import Principal, new_id

_SQL = queries("people")


async def create_account(
    con: Connection,
    email: str,
    name: str,
    password_hash: str | None,
    *,
    by: Principal | None = None,
    address: str | None = None,
) -> uuid.UUID:
    """Make an account; raises Conflict when the address has one. `by` is whoever made it for them."""
    user_id = new_id()
    made = await con.fetchval(
        _SQL["add_account"], user_id, parse_address(email), name, password_hash
    )
    if made is None:
        raise Conflict("This address has an account.", code="account_exists", param="email")
    await audit.record(
        con, by or person(user_id), "account.created", f"user:{user_id}", address=address
    )
    return user_id


async def register(people: People, email: str, name: str, device: Device) -> None:
    """Mail a link that makes an account, or, where there is one, a mail that says so.

    Raises Forbidden where the policy is not `open`.
    """
    if people.registration != "open":
        raise _closed(is_by_invitation=people.registration == "invited")
    email = parse_address(email)
    await _brake_mail(people, "register", email, device)
    async with people.db.globals() as con:
        known = account_of(await con.fetchrow(_SQL["account_by_email"], email))
        ttl_s = people.lifetimes.link_s
        token = await issue(con, "register", ttl_s, email=email, name=name)
        letter = (
            letters.confirm(email, people.link("register", token), ttl_s)
            if known is None
            else letters.known(email)
        )
        await post(con, people.ring, letter, ttl_s=ttl_s)


async def confirm_registration(
    people: People, token: str, password: str, device: Device
) -> uuid.UUID:
    """Make the account of a mailed link, with the password of who has it; raises InvalidInput or Conflict.

    A link that is refused for its password stays good. An invitation is a link too, unless the policy is
    `closed`: it proves the address, and is accepted by itself once somebody is signed in.
    """
    hashed = await _hashed(people, password, device)
    async with people.db.globals() as con:
        if bearers.read(bearers.INVITATION, token) is not None:
            if people.registration == "closed":
                raise _closed()
            email = await invitations.address_of(con, token)
            check_password(password, email)
            return await create_account(con, email, "", hashed, address=device.address)
        if people.registration != "open":
            raise _closed(is_by_invitation=people.registration == "invited")
        spent = await spend(con, token, "register")
        assert spent.email is not None
        check_password(password, spent.email)
        return await create_account(con, spent.email, spent.name, hashed, address=device.address)


async def request_reset(people: People, email: str, device: Device) -> None:
    """Mail a link that sets a new password, if there is an account; the caller learns nothing."""
    email = parse_address(email)
    await _brake_mail(people, "reset", email, device)
    async with people.db.globals() as con:
        account = account_of(await con.fetchrow(_SQL["account_by_email"], email))
        is_real = account is not None and not account.is_disabled
        ttl_s = people.lifetimes.link_s
        if account is not None and is_real:
            token = await issue(con, "reset", ttl_s, user_id=account.user_id)
        else:
            # The same work, so that its time tells nothing: a link that nobody gets, a mail that is too old.
            token = await issue(con, "register", 0, email=email)
        letter = letters.reset(email, people.link("reset-password", token), ttl_s)
        await post(con, people.ring, letter, ttl_s=ttl_s if is_real else 0)


async def confirm_reset(people: People, token: str, password: str, device: Device) -> None:
    """Set the password by a mailed link, end all sessions and all other links; raises InvalidInput."""
    hashed = await _hashed(people, password, device)
    async with people.db.globals() as con:
        spent = await spend(con, token, "reset")
        assert spent.user_id is not None
        account = account_of(await con.fetchrow(_SQL["account"], spent.user_id))
        assert account is not None
        check_password(password, account.email)
        if await con.fetchval(_SQL["set_password"], account.user_id, hashed, None) is None:
            raise InvalidInput("This link is not valid.", code="link_invalid", param="token")
        await con.execute(_SQL["drop_tokens_of_user"], account.user_id)
        await sessions.revoke_others(con, account.user_id, None, "password_reset", device)
        await audit.record(
            con,
            person(account.user_id),
            "password.reset",
            f"user:{account.user_id}",
            address=device.address,
        )
        note = letters.changed(account.email)
        await post(con, people.ring, note, ttl_s=people.lifetimes.link_s)


async def change_password(
    people: People, principal: Principal, old: str, new: str, device: Device
) -> SignedIn:
    """Change the password of whoever is signed in; their other sessions end, and this one gets new tokens."""
    standing = principal.standing
    assert standing is not None
    assert standing.session_id is not None
    user_id = uuid.UUID(principal.subject.removeprefix("user:"))
    await brake(people.db, (key_of("password", str(user_id)), PAIR))
    async with people.db.of(principal) as con:
        account = account_of(await con.fetchrow(_SQL["account"], user_id))
    if account is None or not await people.passwords.is_right(account.password_hash, old):
        raise Forbidden(
            "The old password is not right.", code="password_wrong", param="old_password"
        )
    check_password(new, account.email, param="new_password")
    hashed = await people.passwords.hash(new)
    async with people.db.of(principal) as con:
        known = account.password_hash
        # Before what renews it is removed: a renewal under way has stored its successor by then, or waits.
        await con.execute(_SQL["hold_session"], standing.session_id)
        if await con.fetchval(_SQL["set_password"], user_id, hashed, known) is None:
            raise Unauthenticated("The password was changed meanwhile.", code="token_stale")
        await con.execute(_SQL["drop_tokens_of_user"], user_id)
        await sessions.revoke_others(con, user_id, standing.session_id, "password_changed", device)
        await audit.record(
            con, principal, "password.changed", f"user:{user_id}", address=device.address
        )
        await con.execute(_SQL["drop_refresh"], standing.session_id)
        token = await sessions.renewable(con, standing.session_id, people.lifetimes)
        note = letters.changed(account.email)
        await post(con, people.ring, note, ttl_s=people.lifetimes.link_s)
        return await admitted(people, con, user_id, standing.session_id, token)


async def rename(people: People, principal: Principal, name: str) -> None:
    """Change the name of whoever is signed in."""
    user_id = uuid.UUID(principal.subject.removeprefix("user:"))
    async with people.db.of(principal) as con:
        await con.execute(_SQL["set_name"], user_id, name)


def _closed(*, is_by_invitation: bool = False) -> Forbidden:
    return Forbidden(
        "Accounts are made by invitation here."
        if is_by_invitation
        else "Nobody can register here.",
        code="registration_closed",
        advice="ask an administrator to invite you",
    )


async def _hashed(people: People, password: str, device: Device) -> str:
    """Return the hash of a new password before its link is looked at: no transaction waits for it."""
    check_password(password, "")
    await brake(people.db, (key_of("link", device.address), ADDRESS))
    return await people.passwords.hash(password)


async def _brake_mail(people: People, what: str, email: str, device: Device) -> None:
    await brake(
        people.db,
        (key_of(what, device.address), ADDRESS),
        (key_of(what, email), MAIL),
    )
