"""The brake on guessing: how many tries one key has, shared by all API processes.

Called before a password is looked at or a mail is sent. Invariant: a try is counted before it is made, so that many at
once are not more than one after the other; a key's row is locked by tries with that key alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import orjson

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.errors import Transient

_SQL = queries("people")


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """So many tries at once, and one more every `every_s` seconds (generic cell rate algorithm)."""

    tries: int
    every_s: float


# Somebody who guesses the password of one account from one address …
PAIR = Allowance(tries=8, every_s=60.0)
# … of many accounts from one address, behind which there may be an office …
ADDRESS = Allowance(tries=60, every_s=2.0)
# … or of one account from many addresses: wide, since whoever uses it up locks its owner out for a moment.
ACCOUNT = Allowance(tries=100, every_s=20.0)
# Mails that one address of a person is sent.
MAIL = Allowance(tries=4, every_s=300.0)


def key_of(*words: str | None) -> bytes:
    """Return the key of a row; addresses of people do not stand in the table."""
    return hashlib.sha256(orjson.dumps(words)).digest()


async def brake(db: Database, *tries: tuple[bytes, Allowance]) -> None:
    """Count a try on every key; raises Transient with code `rate_limited` when one has no more.

    A try that is refused counts on none. Keys are taken in order, so that no two wait for each other.
    """
    async with db.globals() as con:
        for key, allowance in sorted(tries, key=lambda one: one[0]):
            arguments = key, allowance.every_s, float(allowance.tries)
            if await con.fetchval(_SQL["brake"], *arguments) is None:
                wait_s: float = await con.fetchval(_SQL["brake_wait"], *arguments)
                raise Transient(
                    "Too many tries.",
                    code="rate_limited",
                    retry_after_s=max(1.0, wait_s),
                    advice="try again after the time in `Retry-After`",
                )


async def release(db: Database, key: bytes) -> None:
    """Forget the tries of a key, whose holder turned out to be right."""
    async with db.globals() as con:
        await con.execute(_SQL["release_brake"], key)
