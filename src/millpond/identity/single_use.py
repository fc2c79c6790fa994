"""Secrets that are handed out once and known here by their digest: refresh tokens, links.

Called by the rooms that issue them. Invariant: what the database keeps cannot be turned back into what was handed out.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from typing import Literal

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput

_SQL = queries("people")
_RANDOM_BYTES = 32
_MAX_CHARS = 200
REFRESH_PREFIX = "mpr_"
LINK_PREFIX = "mpl_"
Purpose = Literal["register", "reset", "operator", "operator_reset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a single-use token was for."""

    purpose: str
    email: str | None
    name: str
    user_id: uuid.UUID | None


def new_secret(prefix: str) -> str:
    """Make 256 random bits behind a prefix that says what they are."""
    return prefix + secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(secret: str) -> bytes:
    """Return what the database knows a secret by; it is random enough for a fast hash."""
    return hashlib.sha256(secret[:_MAX_CHARS].encode("utf-8", "surrogatepass")).digest()


async def issue(
    con: Connection,
    purpose: Purpose,
    ttl_s: float,
    *,
    email: str | None = None,
    name: str = "",
    user_id: uuid.UUID | None = None,
) -> str:
    """Store a single-use token and return it: the only time that it is seen."""
    secret = new_secret(LINK_PREFIX)
    await con.execute(
        _SQL["add_token"], digest_of(secret), purpose, email, name, user_id, float(ttl_s)
    )
    return secret


async def spend(con: Connection, secret: str, *purposes: Purpose) -> Spent:
    """Use a token up; raises InvalidInput when it is unknown, used or too old, which look the same."""
    row = await con.fetchrow(_SQL["take_token"], digest_of(secret), list(purposes))
    if row is None:
        raise InvalidInput(
            "This link is not valid: it was used, it is too old, or it is cut off.",
            code="link_invalid",
            param="token",
            advice="ask for a new one",
        )
    return Spent(**row)
