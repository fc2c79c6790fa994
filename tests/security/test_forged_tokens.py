"""Tokens that nobody here signed, or that are good no more: each is refused with 401, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.security.conftest import Person, World

from millpond.identity.tokens import TYPE
from millpond.types import new_id


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Forge:
    """Somebody with a good token who makes others of it."""

    def __init__(self, world: World, person: Person) -> None:
        self.keyring = world.front.keyring
        self.good = world.token(person)
        self.claims: dict[str, Any] = jwt.decode(self.good, options={"verify_signature": False})
        self.header = jwt.get_unverified_header(self.good)
        self.jwk = self.keyring.jwks()["keys"][0]
        self.stranger = Ed25519PrivateKey.generate()

    def signed(self, header: dict[str, Any], claims: dict[str, Any], signature: bytes) -> str:
        head, body = b64(json.dumps(header).encode()), b64(json.dumps(claims).encode())
        return f"{head}.{body}.{b64(signature)}"

    def genuine(self, **changes: Any) -> str:
        """Sign changed claims with the installation's own key; None leaves one out."""
        claims = {k: v for k, v in {**self.claims, **changes}.items() if v is not None}
        return self.by(self.keyring._signer.private, {}, claims)

    def by(self, key: Any, header: dict[str, Any], claims: dict[str, Any] | None = None) -> str:
        return jwt.encode(
            claims or self.claims, key, algorithm="EdDSA", headers={**self.header, **header}
        )

    def hmac_of(self, secret: bytes, algorithm: str = "HS256") -> str:
        header = {**self.header, "alg": algorithm}
        text = self.signed(header, self.claims, b"").rsplit(".", 1)[0]
        mac = hmac.new(secret, text.encode(), hashlib.sha256).digest()
        return f"{text}.{b64(mac)}"


def embedded(forge: Forge) -> str:
    public = forge.stranger.public_key().public_bytes_raw()
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(public), "kid": forge.jwk["kid"]}
    return forge.by(forge.stranger, {"jwk": jwk})


def rs256(forge: Forge) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return jwt.encode(forge.claims, key, algorithm="RS256", headers=forge.header | {"alg": "RS256"})


FORGERIES: dict[str, Callable[[Forge], str]] = {
    "none": lambda f: f.signed({**f.header, "alg": "none"}, f.claims, b""),
    "none, in capitals": lambda f: f.signed({**f.header, "alg": "NONE"}, f.claims, b""),
    "no algorithm": lambda f: f.signed({"typ": TYPE}, f.claims, b"x"),
    "HMAC with the public key": lambda f: f.hmac_of(base64.urlsafe_b64decode(f.jwk["x"] + "==")),
    "HMAC with the public key as JSON": lambda f: f.hmac_of(json.dumps(f.jwk).encode()),
    "HMAC with nothing": lambda f: f.hmac_of(b""),
    "RSA of a stranger": rs256,
    "a stranger under a known id": lambda f: f.by(f.stranger, {}),
    "the key in the header": embedded,
    "the key at an address": lambda f: f.by(f.stranger, {"jku": "http://127.0.0.1:9/jwks"}),
    "certificates at an address": lambda f: f.by(f.stranger, {"x5u": "http://127.0.0.1:9/c"}),
    "an id that is a path": lambda f: f.by(f.stranger, {"kid": "../../../../dev/null"}),
    "an id that is SQL": lambda f: f.by(f.stranger, {"kid": "' union select '1"}),
    "an id that is a list": lambda f: f.signed({**f.header, "kid": ["x"]}, f.claims, b"x" * 64),
    "another type": lambda f: f.by(f.keyring._signer.private, {"typ": "JWT"}),
    "a critical extension": lambda f: f.by(f.keyring._signer.private, {"crit": ["x"], "x": 1}),
    "another issuer": lambda f: f.genuine(iss="https://elsewhere.example"),
    "no issuer": lambda f: f.genuine(iss=None),
    "another audience": lambda f: f.genuine(aud="elsewhere"),
    "expired": lambda f: f.genuine(exp=int(time.time()) - 60),
    "no expiry": lambda f: f.genuine(exp=None),
    "an expiry that is no number": lambda f: f.genuine(exp="tomorrow"),
    "not yet": lambda f: f.genuine(nbf=int(time.time()) + 600),
    "issued in the future": lambda f: f.genuine(iat=int(time.time()) + 600),
    "a session that is none": lambda f: f.genuine(sid=str(new_id())),
    "a session that is no id": lambda f: f.genuine(sid="x"),
    "rights of an older version": lambda f: f.genuine(
        orgs=[{**f.claims["orgs"][0], "v": f.claims["orgs"][0]["v"] - 1}]
    ),
    "seats that are none": lambda f: f.genuine(orgs="all"),
    "truncated": lambda f: f.good[:-10],
    "two parts": lambda f: f.good.rsplit(".", 1)[0],
    "a changed claim": lambda f: f.signed(f.header, {**f.claims, "operator": True}, b"x" * 64),
    "huge": lambda f: "x" * 20_000,
    "not ASCII": lambda f: "t\u00f6ken",
    "encrypted": lambda f: "a.b.c.d.e",
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_token_is_refused(world: World, forgery: str) -> None:
    forge = Forge(world, await world.member("owner"))
    good = await world.front.client(token=forge.good)
    assert (await good.get("/v1/runs")).status_code == 200
    caller = await world.front.client(token="")
    token = FORGERIES[forgery](forge)
    response = await caller.get("/v1/runs", headers={"Authorization": f"Bearer {token}".encode()})
    assert response.status_code == 401, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert token not in response.text


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ("session", "token_stale"),
        ("membership", "token_stale"),
        ("account", "token_stale"),
        ("key", "token_unknown_key"),
    ],
)
async def test_a_token_is_refused_once_what_it_stands_on_is_gone(
    world: World, table: str, code: str
) -> None:
    person = await world.member("admin")
    caller = await world.client(person)
    assert (await caller.get("/v1/runs")).status_code == 200
    match table:
        case "session":
            await world.owner.execute(
                "update login_session set revoked_at = now(), revoked_why = 'test'"
            )
        case "membership":
            await world.owner.execute("delete from membership where user_id = $1", person.user_id)
        case "account":
            await world.owner.execute("update account set disabled_at = now()")
        case "key":
            await world.owner.execute("update signing_key set retired_at = now() - interval '2 d'")
            world.front.keyring._refreshed_at = float("-inf")
    response = await caller.get("/v1/runs")
    assert (response.status_code, response.json()["code"]) == (401, code)
