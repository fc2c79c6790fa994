"""Signing keys: Ed25519 pairs in the database, the private half sealed.

Called by `tokens` alone. Invariant: processes that start together on an empty database end up with
the same single key, since making the first is done under an advisory lock.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import orjson
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from millpond.db.pool import Connection, Database, Record
from millpond.db.queries import queries
from millpond.errors import Permanent
from millpond.identity import audit
from millpond.identity.ring import KeyRing
from millpond.types import NO_ORG, Principal, new_id

ALGORITHM = "EdDSA"
PURPOSE = "signing_key"
_SQL = queries("identity")
_log = structlog.get_logger("millpond.signing")
# Whoever has the database and the installation's key, at a terminal.
_HOST = Principal(org_id=NO_ORG, subject="host")


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """One known key: all that verifying needs; how to sign stays with `Signer`."""

    kid: str
    public: Ed25519PublicKey
    jwk: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class KeyFacts:
    """What may be told of a key: `state` is current, overlapping (verifies, no longer signs) or ended."""

    kid: str
    state: str
    created_at: datetime
    retired_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Signer:
    """The current key with its private half."""

    kid: str
    private: Ed25519PrivateKey


async def load(db: Database, ring: KeyRing) -> tuple[Signer, list[SigningKey]]:
    """Return the key to sign with and all keys to verify with, making the first one if needed.

    Raises Permanent when the stored key was sealed with another installation key.
    """
    async with db.globals() as con:
        await ring.current(con)
        rows = await con.fetch(_SQL["signing_keys"])
        if not any(row["is_current"] for row in rows):
            await con.execute(_SQL["lock_signing_keys"])
            rows = await con.fetch(_SQL["signing_keys"])
            if not any(row["is_current"] for row in rows):
                await _add_key(con, ring)
                rows = await con.fetch(_SQL["signing_keys"])
    return _signer(rows[0], ring), [_known(row) for row in rows]


async def reload(db: Database, ring: KeyRing, signer: Signer) -> tuple[Signer, list[SigningKey]]:
    """As `load`, for who has loaded before: without the installation's key, it goes on with the key it signs with."""
    try:
        return await load(db, ring)
    except Permanent as error:
        _log.error("signing_key.not_opened", code=error.code)
    async with db.globals() as con:
        rows = await con.fetch(_SQL["signing_keys"])
    return signer, [_known(row) for row in rows]


async def rotate(db: Database, ring: KeyRing, *, at_once: bool = False) -> str:
    """Sign with a new key from now on; returns its id.

    Tokens of the older keys stay good until the last of them has expired, or with `at_once` are refused as
    soon as each process has read the keys again (within a minute). One rotation waits for another.
    """
    async with db.globals() as con:
        await con.execute(_SQL["lock_signing_keys"])
        await con.execute(_SQL["retire_signing_keys"])
        if at_once:
            await con.execute(_SQL["end_signing_keys"])
        kid = await _add_key(con, ring)
        await audit.record(con, _HOST, "signing_key.rotated", f"signing_key:{kid}")
    return kid


async def listed(db: Database) -> list[KeyFacts]:
    """Return every key that ever signed here, the newest first."""
    async with db.globals() as con:
        rows = await con.fetch(_SQL["all_signing_keys"])
    return [KeyFacts(**dict(row)) for row in rows]


async def _add_key(con: Connection, ring: KeyRing) -> str:
    private = Ed25519PrivateKey.generate()
    kid = new_id().hex
    jwk = {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": _b64url(private.public_key().public_bytes_raw()),
        "kid": kid,
        "alg": ALGORITHM,
        "use": "sig",
    }
    seal = await ring.current(con)
    sealed = seal.seal(private.private_bytes_raw(), PURPOSE, kid)
    await con.execute(_SQL["add_signing_key"], kid, orjson.dumps(jwk).decode(), sealed, seal.key_id)
    return kid


def _signer(row: Record, ring: KeyRing) -> Signer:
    private = ring.open(row["private_sealed"], row["seal_key_id"], PURPOSE, row["kid"])
    return Signer(kid=row["kid"], private=Ed25519PrivateKey.from_private_bytes(private))


def _known(row: Record) -> SigningKey:
    jwk: dict[str, str] = orjson.loads(row["public_jwk"])
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(jwk["x"] + "=="))
    return SigningKey(kid=row["kid"], public=public, jwk=jwk)


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
