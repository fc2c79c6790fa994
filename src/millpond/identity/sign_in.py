"""Signing in by email and password, renewing that, and signing out.

Called by the routes of `/v1/auth`. Invariants: a wrong password, an unknown address and a disabled account get one
answer, after one computation of the same size; a password that was changed meanwhile opens nothing.
"""

from __future__ import annotations

from millpond.db.queries import queries
from millpond.errors import InvalidInput, Unauthenticated
from millpond.identity import sessions
from millpond.identity.addresses import parse_address
from millpond.identity.brake import ACCOUNT, ADDRESS, PAIR, brake, key_of, release
from millpond.identity.people import Account, People, SignedIn, account_of, admitted
from millpond.identity.sessions import Device

_SQL = queries("people")


async def sign_in(people: People, email: str, password: str, device: Device) -> SignedIn:
    """Open a session; raises Unauthenticated, or Transient with `rate_limited` for who tries too often."""
    email = email.strip().lower()
    pair = key_of("sign_in", device.address, email)
    await brake(
        people.db,
        (pair, PAIR),
        (key_of("sign_in", device.address), ADDRESS),
        (key_of("sign_in_to", email), ACCOUNT),
    )
    account = await verified(people, email, password)
    if account is None:
        raise _refused()
    signed_in = await _open(people, account, password, device)
    if signed_in is None:
        raise _refused()
    await release(people.db, pair)
    return signed_in


async def verified(people: People, email: str, password: str) -> Account | None:
    """Return the account whose password this is, after a computation in any case."""
    try:
        known = parse_address(email)
    except InvalidInput:
        known = ""  # nobody's
    async with people.db.globals() as con:
        account = account_of(await con.fetchrow(_SQL["account_by_email"], known))
    stored = account.password_hash if account is not None else None
    is_right = await people.passwords.is_right(stored, password)
    return account if is_right and account is not None and not account.is_disabled else None


async def _open(people: People, account: Account, password: str, device: Device) -> SignedIn | None:
    """Open a session for an account as it was verified; None when it changed meanwhile."""
    stored = account.password_hash
    assert stored is not None
    is_outdated = people.passwords.is_outdated(stored)
    newer = await people.passwords.hash(password) if is_outdated else None
    await people.keyring.freshen()
    async with people.db.globals() as con:
        if await con.fetchval(_SQL["hold_account"], account.user_id, stored) is None:
            return None
        session_id, token = await sessions.open_session(
            con, account.user_id, device, people.lifetimes
        )
        signed_in = await admitted(people, con, account.user_id, session_id, token)
    if newer is not None:
        async with people.db.globals() as con:
            await con.execute(_SQL["rehash"], account.user_id, stored, newer)
    return signed_in


async def refresh(people: People, secret: str, device: Device) -> SignedIn:
    """Trade a refresh token for the next one and an access token with the rights of now.

    Raises Unauthenticated; the session of a token that was used before is ended.
    """
    signed_in = None
    await people.keyring.freshen()
    async with people.db.globals() as con:
        renewed = await sessions.use_refresh(con, secret, device)
        if renewed is not None:
            user_id, session_id = renewed
            token = await sessions.renewable(con, session_id, people.lifetimes)
            signed_in = await admitted(people, con, user_id, session_id, token)
    if signed_in is None:
        raise sessions.not_renewed()
    return signed_in


async def sign_out(people: People, secret: str, device: Device) -> None:
    """End the session of a refresh token; an unknown one is no error."""
    async with people.db.globals() as con:
        await sessions.end_by_refresh(con, secret, device)


def _refused() -> Unauthenticated:
    return Unauthenticated(
        "Email address or password are not right.",
        code="sign_in_refused",
        advice="reset the password if you do not know it",
    )
