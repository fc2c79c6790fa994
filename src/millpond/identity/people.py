"""What the rooms of people share, and what they hand to somebody who is signed in.

Made by `cli`, passed to the routes. Invariant: an access token is minted in the transaction that read the seats in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from millpond.db.pool import Connection, Database, Record
from millpond.db.queries import queries
from millpond.errors import Unauthenticated
from millpond.identity.passport import Passport, Seat, seats_of
from millpond.identity.passwords import Passwords
from millpond.identity.ring import KeyRing
from millpond.identity.sessions import Lifetimes
from millpond.identity.tokens import Keyring

_SQL = queries("people")
Registration = Literal["closed", "invited", "open"]


@dataclass(frozen=True, kw_only=True)
class People:
    """What signing in works with; `public_url` begins every link, `registration` says who may make an account."""

    db: Database
    keyring: Keyring
    ring: KeyRing
    passwords: Passwords
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    registration: Registration = "closed"
    public_url: str = "http://127.0.0.1:8080"

    def link(self, page: str, token: str) -> str:
        """Return a link with its token behind `#`, which browsers send to no server."""
        return f"{self.public_url.rstrip('/')}/{page}#token={token}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Somebody who can sign in."""

    user_id: uuid.UUID
    email: str
    name: str
    is_operator: bool
    version: int
    password_hash: str | None
    is_disabled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A seat in an org as its holder sees it."""

    seat: Seat
    name: str
    is_suspended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedIn:
    """What somebody gets who is signed in; seen once, and by them alone."""

    access_token: str
    refresh_token: str
    expires_in_s: int
    account: Account
    places: Sequence[Place]
    session_id: uuid.UUID


def account_of(row: Record | None) -> Account | None:
    """Read an account from its row."""
    return None if row is None else Account(**row)


async def account_by_id(con: Connection, user_id: uuid.UUID) -> Account:
    """Return the account of somebody who has one; raises Unauthenticated when it is gone."""
    account = account_of(await con.fetchrow(_SQL["account"], user_id))
    if account is None:
        raise Unauthenticated("There is no such account.", code="token_stale")
    return account


async def places_of(con: Connection, user_id: uuid.UUID) -> list[Place]:
    """Return somebody's places in orgs, oldest first."""
    rows = await con.fetch(_SQL["seats"], user_id)
    return [
        Place(seat=seat, name=row["name"], is_suspended=row["is_suspended"])
        for seat, row in zip(seats_of(map(dict, rows)), rows, strict=True)
    ]


async def admitted(
    people: People, con: Connection, user_id: uuid.UUID, session_id: uuid.UUID, refresh_token: str
) -> SignedIn:
    """Mint an access token for a live session; raises Unauthenticated when its account was disabled."""
    account = account_of(await con.fetchrow(_SQL["account"], user_id))
    if account is None or account.is_disabled:
        raise Unauthenticated("This account is disabled.", code="refresh_invalid")
    places = await places_of(con, user_id)
    passport = Passport(
        subject=f"user:{user_id}",
        session_id=session_id,
        stamp=account.version,
        seats=[place.seat for place in places],
        is_operator=account.is_operator,
    )
    ttl_s = people.lifetimes.access_s
    return SignedIn(
        access_token=people.keyring.mint_access(passport, ttl_s),
        refresh_token=refresh_token,
        expires_in_s=int(ttl_s),
        account=account,
        places=places,
        session_id=session_id,
    )
