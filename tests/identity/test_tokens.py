"""Tokens: minted, verified, refused for each reason; keys made once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from millpond.db.pool import Database
from millpond.errors import Permanent, Unauthenticated, Unavailable
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.tokens import Keyring
from millpond.types import Principal

SEAL = KeyRing(Seal(bytes(KEY_BYTES)))
PRINCIPAL = Principal(
    org_id=7,
    subject="user:ann",
    permissions=frozenset({"runs:read", "runs:start"}),
    roles=frozenset({"support"}),
)


@pytest.fixture
async def keyring(db: Database) -> Keyring:
    return await Keyring.open(db, SEAL)


def refused(keyring: Keyring, token: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        keyring.verify(token)
    assert token not in caught.value.message
    return caught.value.code


def forged(key: Any, kid: object, *, algorithm: str = "EdDSA", **changes: Any) -> str:
    """Sign claims with another key; None leaves a claim out."""
    now = int(time.time())
    claims = {
        "iss": "millpond",
        "aud": "millpond",
        "sub": "user:ann",
        "org": 7,
        "permissions": [],
        "roles": [],
        "iat": now,
        "exp": now + 60,
        "jti": "1",
        **changes,
    }
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid, "typ": "at+jwt"})


def part(document: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()


async def test_a_minted_token_gives_the_principal_back(keyring: Keyring) -> None:
    token = keyring.mint(PRINCIPAL, "pond", 60)
    assert keyring.verify(token) == PRINCIPAL
    assert keyring.verify(token) == PRINCIPAL  # the remembered way


async def test_claims_are_those_that_others_expect(keyring: Keyring) -> None:
    claims = jwt.decode(keyring.mint(PRINCIPAL, "pond", 60), options={"verify_signature": False})
    assert claims["org"] == 7
    assert claims["org_slug"] == "pond"
    assert claims["permissions"] == ["runs:read", "runs:start"]
    assert claims["exp"] - claims["iat"] == 60


async def test_tokens_verify_by_the_published_keys_alone(keyring: Keyring) -> None:
    token = keyring.mint(PRINCIPAL, "pond", 60)
    (jwk,) = keyring.jwks()["keys"]
    assert set(jwk) == {"kty", "crv", "x", "kid", "alg", "use"}
    assert jwk["kid"] == jwt.get_unverified_header(token)["kid"]
    claims = jwt.decode(token, jwt.PyJWK(jwk), algorithms=["EdDSA"], audience="millpond")
    assert claims["sub"] == "user:ann"


async def test_expired_token(keyring: Keyring) -> None:
    token = keyring.mint(PRINCIPAL, "pond", -60)
    with pytest.raises(Unauthenticated, match=r"expired at \d{4}-\d\d-\d\d .* UTC") as caught:
        keyring.verify(token)
    assert caught.value.code == "token_expired"


async def test_a_remembered_token_expires_too(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = keyring.mint(PRINCIPAL, "pond", 60)
    keyring.verify(token)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert refused(keyring, token) == "token_expired"


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "....", "é" * 20, "a" * 10_000, "e30.e30."])
async def test_garbage(keyring: Keyring, token: str) -> None:
    with pytest.raises(Unauthenticated):
        keyring.verify(token)


async def test_changed_payload(keyring: Keyring) -> None:
    head, body, signature = keyring.mint(PRINCIPAL, "pond", 60).split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    claims["org"] = 8
    assert refused(keyring, f"{head}.{part(claims)}.{signature}") == "token_signature"


async def test_algorithm_none(keyring: Keyring) -> None:
    kid = keyring.jwks()["keys"][0]["kid"]
    body = keyring.mint(PRINCIPAL, "pond", 60).split(".")[1]
    for name in ("none", "None", "NONE"):
        token = f"{part({'alg': name, 'typ': 'JWT', 'kid': kid})}.{body}."
        assert refused(keyring, token) == "token_algorithm"


async def test_public_key_used_as_hmac_secret(keyring: Keyring) -> None:
    jwk = keyring.jwks()["keys"][0]
    head = part({"alg": "HS256", "typ": "JWT", "kid": jwk["kid"]})
    body = keyring.mint(PRINCIPAL, "pond", 60).split(".")[1]
    secret = base64.urlsafe_b64decode(jwk["x"] + "==")
    mac = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest()
    signature = base64.urlsafe_b64encode(mac).rstrip(b"=").decode()
    assert refused(keyring, f"{head}.{body}.{signature}") == "token_algorithm"


async def test_another_key_under_a_known_id(keyring: Keyring) -> None:
    kid = keyring.jwks()["keys"][0]["kid"]
    assert refused(keyring, forged(Ed25519PrivateKey.generate(), kid)) == "token_signature"


@pytest.mark.parametrize("kid", ["unknown", "../../etc/passwd", "' or 1=1 --", ""])
async def test_unknown_key_id(keyring: Keyring, kid: str) -> None:
    assert refused(keyring, forged(Ed25519PrivateKey.generate(), kid)) == "token_unknown_key"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iss": "other"}, "token_issuer"),
        ({"aud": "other"}, "token_audience"),
        ({"exp": None}, "token_malformed"),
        ({"iss": None}, "token_malformed"),
        ({"aud": None}, "token_malformed"),
        ({"sub": None}, "token_malformed"),
        ({"org": None}, "token_malformed"),
        ({"jti": None}, "token_malformed"),
        ({"org": "7"}, "token_malformed"),
        ({"org": True}, "token_malformed"),
        ({"org": 0}, "token_malformed"),
        ({"org": 2**63}, "token_malformed"),
        ({"sub": ""}, "token_malformed"),
        ({"permissions": "runs:read"}, "token_malformed"),
        ({"permissions": [1]}, "token_malformed"),
        ({"roles": {"a": 1}}, "token_malformed"),
        ({"exp": "soon"}, "token_malformed"),
        ({"iat": int(time.time()) + 3600}, "token_too_early"),
        ({"nbf": int(time.time()) + 3600}, "token_too_early"),
    ],
)
async def test_claims_that_do_not_hold(
    keyring: Keyring, changes: dict[str, Any], code: str
) -> None:
    signer = keyring._signer
    assert refused(keyring, forged(signer.private, signer.kid, **changes)) == code


async def test_two_starts_at_once_make_one_key(db: Database) -> None:
    rings = await asyncio.gather(*(Keyring.open(db, SEAL) for _ in range(6)))
    assert {ring._signer.kid for ring in rings} == {rings[0]._signer.kid}
    async with db.globals() as con:
        assert await con.fetchval("select count(*) from signing_key") == 1
    token = rings[0].mint(PRINCIPAL, "pond", 60)
    assert all(ring.verify(token) == PRINCIPAL for ring in rings)


async def test_the_private_half_is_sealed(db: Database, keyring: Keyring) -> None:
    async with db.globals() as con:
        row = await con.fetchrow("select * from signing_key")
    assert row is not None
    private = keyring._signer.private.private_bytes_raw()
    assert private not in row["private_sealed"]
    assert row["seal_key_id"] == SEAL.key_id


async def test_another_installation_key_is_refused_with_advice(
    db: Database, keyring: Keyring
) -> None:
    with pytest.raises(Permanent, match="what installation key") as caught:
        await Keyring.open(db, KeyRing(Seal(b"x" * KEY_BYTES)))
    assert "MILLPOND_SECRET_KEY" in (caught.value.advice or "")


async def test_a_retired_key_verifies_and_no_longer_signs(db: Database, keyring: Keyring) -> None:
    old = keyring.mint(PRINCIPAL, "pond", 60)
    async with db.globals() as con:
        await con.execute("update signing_key set retired_at = clock_timestamp()")
    later = await Keyring.open(db, SEAL)
    assert later.verify(old) == PRINCIPAL
    assert later._signer.kid != keyring._signer.kid
    assert len(later.jwks()["keys"]) == 2


async def test_a_key_retired_long_ago_is_unknown(db: Database, keyring: Keyring) -> None:
    old = keyring.mint(PRINCIPAL, "pond", 60)
    async with db.globals() as con:
        await con.execute(
            "update signing_key set retired_at = clock_timestamp() - interval '2 days'"
        )
    assert refused(await Keyring.open(db, SEAL), old) == "token_unknown_key"


async def test_refresh_learns_new_keys_but_not_at_every_call(
    db: Database, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with db.globals() as con:
        await con.execute("update signing_key set retired_at = clock_timestamp()")
    token = (await Keyring.open(db, SEAL)).mint(PRINCIPAL, "pond", 60)
    await keyring.refresh()
    assert refused(keyring, token) == "token_unknown_key"
    keyring._refreshed_at = float("-inf")
    await asyncio.gather(*(keyring.refresh() for _ in range(5)))
    assert keyring.verify(token) == PRINCIPAL
    assert keyring.age_s < 60


async def test_while_the_keys_cannot_be_read_known_ones_are_good_and_nobody_asks_every_time(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = keyring.mint(PRINCIPAL, "pond", 3600)
    asked, held = 0, asyncio.Event()

    async def away(*_: Any) -> Any:
        nonlocal asked
        asked += 1
        await held.wait()
        raise Unavailable("the database is away")

    monkeypatch.setattr("millpond.identity.tokens.reload", away)
    keyring._refreshed_at -= 120
    first = asyncio.create_task(keyring.freshen())
    held.set()
    await first
    for _ in range(50):
        await keyring.freshen()
        assert keyring.verify(token) == PRINCIPAL
    assert asked == 1
    # A token with an unknown key: told at once that the keys cannot be read, and when to come again.
    with pytest.raises(Unavailable, match="cannot be read") as caught:
        await keyring.refresh()
    assert caught.value.retry_after_s is not None
    assert asked == 1
    # Five seconds later one asks, and the others do not wait for that.
    keyring._failed_at -= 6
    held.clear()
    trying = asyncio.create_task(keyring.freshen())
    while asked == 1:
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await keyring.freshen()
    assert not trying.done()
    held.set()
    await trying
    assert asked == 2
    # After ten minutes they are good no more.
    keyring._refreshed_at -= 600
    with pytest.raises(Unavailable):
        await keyring.freshen()
    monkeypatch.undo()
    keyring._failed_at -= 6
    await keyring.freshen()
    assert keyring.age_s < 60
