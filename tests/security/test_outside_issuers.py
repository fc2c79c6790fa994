"""Tokens of a real issuer on loopback: what they give, and everything that they must not give.

The issuer signs with real keys and is asked over a real socket; the API asks it through the egress guard.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.responses import JSONResponse, Response
from tests.api.conftest import Client
from tests.issuer import AUDIENCE, Issuer, SigningKey, an_issuer, public_jwk, rsa_key
from tests.security.conftest import World
from tests.security.test_forged_tokens import b64

RULES = [{"claim": "roles", "values": ["pond-admins"], "role": "admin"},
         {"claim": "roles", "values": ["pond-users"], "role": "builder"}]  # fmt: skip


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with an_issuer() as served:
        yield served


@pytest.fixture
async def owner(world: World) -> Client:
    return await world.owner_of(world.org_id)


async def registered(owner: Client, issuer: Issuer, **changes: Any) -> str:
    """Let the owner's org accept the issuer's tokens; returns the id."""
    body = {"name": "Ours", "url": issuer.url, "audiences": [AUDIENCE], "rules": RULES, **changes}
    response = await owner.post("/v1/issuers", json=body)
    assert response.status_code == 201, response.text
    made: str = response.json()["id"]
    return made


async def bearer(world: World, token: str, org_id: int | None = None) -> Client:
    """Open a client of whoever holds a token, for an org."""
    client = await world.front.client(token=token)
    client.headers["X-Organization-Id"] = str(org_id or world.org_id)
    return client


def told(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json().get("code", "")


async def asked(world: World, token: str, org_id: int | None = None, path: str = "/v1/runs") -> Any:
    return told(await (await bearer(world, token, org_id)).get(path))


def later(world: World, seconds: float) -> None:
    """Let time pass for what is known of issuers' keys."""
    keys = world.front.app.state.ports.outside.keys
    clock = keys._clock
    keys._clock = lambda: clock() + seconds


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "ES256", "ES512", "EdDSA"])
async def test_a_program_signs_in_at_its_issuer_and_does_what_its_role_may(
    world: World, owner: Client, issuer: Issuer, algorithm: str
) -> None:
    await registered(owner, issuer, algorithms=[algorithm])
    issuer.rotate(algorithm, keep=False)
    issuer.clients["bot"] = {"secret": "s3cret", "claims": {"sub": "bot", "client_id": "bot"}}
    form = {"grant_type": "client_credentials", "client_id": "bot", "client_secret": "s3cret"}
    async with httpx2.AsyncClient(trust_env=False) as at_issuer:
        answer = await at_issuer.post(f"{issuer.url}/token", data=form)
    caller = await bearer(world, answer.json()["access_token"])
    await world.front.publish("echo")
    run = await caller.post("/v1/runs", json={"flow": "echo"})
    assert run.status_code == 202, run.text
    assert (await caller.get("/v1/members")).status_code == 200  # as builders may
    assert told(await caller.get("/v1/api-keys")) == (403, "permission_missing")
    (found,) = (await owner.get("/v1/outside-identities")).json()["data"]
    assert (found["outside_subject"], found["role"], found["label"]) == ("bot", "builder", "bot")
    row = await world.owner.fetchrow("select subject, stamp from run")
    assert row["subject"] == found["subject"]
    assert row["stamp"] is not None


class Forge:
    """Somebody who knows all that the issuer publishes, and has a good token."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.key = issuer.keys[-1]
        self.header = {"kid": self.key.kid, "typ": "at+jwt", "alg": self.key.algorithm}

    def raw(self, header: dict[str, Any], signature: bytes = b"x" * 256) -> str:
        claims = self.issuer.claims()
        parts = [json.dumps(one).encode() for one in (header, claims)]
        return ".".join([*map(b64, parts), b64(signature) if signature else ""])

    def hmac_of(self, secret: bytes, algorithm: str = "HS256", said: str = "") -> str:
        text = self.raw({**self.header, "alg": said or algorithm}, b"").removesuffix(".")
        digest = {"HS256": hashlib.sha256, "HS512": hashlib.sha512}[algorithm]
        return f"{text}.{b64(hmac.new(secret, text.encode(), digest).digest())}"

    def by_stranger(self, **header: Any) -> str:
        key = rsa_key(7)
        headers = {**self.header, **header}
        return jwt.encode(self.issuer.claims(), key, algorithm="RS256", headers=headers)

    def pem(self) -> bytes:
        return self.key.private.public_key().public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )


def embedded(f: Forge) -> str:
    return f.by_stranger(jwk=public_jwk(rsa_key(7), "RS256", f.key.kid))


def truncated(f: Forge) -> str:
    return f.issuer.token()[:-10]


FORGERIES: dict[str, tuple[Callable[[Forge], str], str]] = {
    "none": (lambda f: f.raw({**f.header, "alg": "none"}, b""), "token_algorithm"),
    "none, in capitals": (lambda f: f.raw({**f.header, "alg": "NONE"}, b""), "token_algorithm"),
    "no algorithm": (lambda f: f.raw({"kid": f.key.kid}), "token_algorithm"),
    "HMAC with the public key as PEM": (lambda f: f.hmac_of(f.pem()), "token_algorithm"),
    "HMAC with the public key as PEM, said to be RSA": (
        lambda f: f.hmac_of(f.pem(), said="RS256"), "token_signature"
    ),
    "HMAC with the public key's JSON": (
        lambda f: f.hmac_of(json.dumps(public_jwk(f.key.private, "RS256", f.key.kid)).encode()),
        "token_algorithm",
    ),
    "HMAC with nothing": (lambda f: f.hmac_of(b"", "HS512"), "token_algorithm"),
    "another algorithm of the same key": (
        lambda f: jwt.encode(f.issuer.claims(), f.key.private, "RS512", {**f.header, "alg": "RS512"}),
        "token_algorithm",
    ),
    "an algorithm that its key is not for": (
        lambda f: f.raw({**f.header, "alg": "ES256"}), "token_unknown_key"),
    "a stranger under a known id": (lambda f: f.by_stranger(), "token_signature"),
    "a stranger under an unknown id": (lambda f: f.by_stranger(kid="other"), "token_unknown_key"),
    "the key in the header": (embedded, "token_signature"),
    "the key at an address": (
        lambda f: f.by_stranger(jku=f"{f.issuer.url}/forged", kid="f"), "token_unknown_key"),
    "certificates at an address": (
        lambda f: f.by_stranger(x5u=f"{f.issuer.url}/forged"), "token_signature"),
    "an id that is a path": (lambda f: f.by_stranger(kid="../../dev/null"), "token_unknown_key"),
    "an id that is SQL": (lambda f: f.by_stranger(kid="' or 1=1 --"), "token_unknown_key"),
    "an id that is a list": (lambda f: f.raw({**f.header, "kid": ["x"]}), "token_malformed"),
    "no id": (lambda f: f.issuer.token({"kid": None}), "token_malformed"),
    "a critical extension": (lambda f: f.issuer.token({"crit": ["x"], "x": 1}), "token_malformed"),
    "a body beside it": (lambda f: f.raw({**f.header, "b64": False}), "token_malformed"),
    "a logout token": (lambda f: f.issuer.token({"typ": "logout+jwt"}), "token_type"),
    "a proof of possession": (lambda f: f.issuer.token({"typ": "dpop+jwt"}), "token_type"),
    "a type that is a number": (lambda f: f.raw({**f.header, "typ": 1}), "token_type"),
    "another audience": (lambda f: f.issuer.token(aud="elsewhere"), "token_audience"),
    "audiences of others": (lambda f: f.issuer.token(aud=["a", "b"]), "token_audience"),
    "an audience that is a part of ours": (
        lambda f: f.issuer.token(aud=AUDIENCE[:-1]), "token_audience"),
    "no audience": (lambda f: f.issuer.token(aud=None), "token_malformed"),
    "expired": (lambda f: f.issuer.token(exp=int(time.time()) - 60), "token_expired"),
    "expired before all time": (lambda f: f.issuer.token(exp=-(10**18)), "token_expired"),
    "no expiry": (lambda f: f.issuer.token(exp=None), "token_malformed"),
    "an expiry that is no number": (lambda f: f.issuer.token(exp="soon"), "token_malformed"),
    "an endless expiry": (lambda f: f.issuer.token(exp=float("inf")), "token_algorithm"),
    "an expiry past all time": (lambda f: f.issuer.token(exp=10**18), "token_malformed"),
    "not yet": (lambda f: f.issuer.token(nbf=int(time.time()) + 600), "token_too_early"),
    "issued in the future": (lambda f: f.issuer.token(iat=int(time.time()) + 600), "token_too_early"),
    "issued before all time": (lambda f: f.issuer.token(iat=-1e300), "token_malformed"),
    "no time of issue": (lambda f: f.issuer.token(iat=None), "token_malformed"),
    "no subject": (lambda f: f.issuer.token(sub=None), "token_malformed"),
    "an empty subject": (lambda f: f.issuer.token(sub=""), "token_malformed"),
    "a subject that nothing could store": (lambda f: f.issuer.token(sub="a\x00b"), "token_malformed"),
    "a subject that is half a character": (lambda f: f.issuer.token(sub="\ud800"), "token_algorithm"),
    "a subject that is long": (lambda f: f.issuer.token(sub="x" * 256), "token_malformed"),
    "another issuer": (lambda f: f.issuer.token(iss="https://elsewhere.example"), "token_issuer"),
    "an issuer with a slash": (lambda f: f.issuer.token(iss=f"{f.issuer.url}/"), "token_issuer"),
    "an issuer in capitals": (lambda f: f.issuer.token(iss=f.issuer.url.upper()), "token_issuer"),
    "no issuer": (lambda f: f.issuer.token(iss=None), "token_algorithm"),
    "an issuer that is ours": (lambda f: f.issuer.token(iss="millpond"), "token_algorithm"),
    "truncated": (truncated, "token_signature"),
    "deep": (lambda f: f"{b64(b'[' * 9000)}.{b64(json.dumps(f.issuer.claims()).encode())}.x",
             "token_malformed"),
    "deep within": (lambda f: f"{b64(b'{}')}.{b64(b'[' * 9000)}.x", "token_malformed"),
    "large": (lambda f: f.issuer.token(more="x" * 20_000), "token_malformed"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_token_is_refused(
    world: World, owner: Client, issuer: Issuer, forgery: str
) -> None:
    await registered(owner, issuer)
    assert await asked(world, issuer.token()) == (200, "")
    make, code = FORGERIES[forgery]
    token = make(Forge(issuer))
    response = await (await bearer(world, token)).get("/v1/runs")
    assert told(response) == (401, code), response.text
    assert token not in response.text
    assert set(issuer.asked) == {"/.well-known/openid-configuration", "/keys"}
    assert await world.count("outside_identity") == 1


@pytest.mark.parametrize("typ", [None, "JWT", "at+jwt", "AT+JWT", "application/at+jwt"])
async def test_types_of_access_tokens_are_accepted(
    world: World, owner: Client, issuer: Issuer, typ: str | None
) -> None:
    await registered(owner, issuer)
    assert await asked(world, issuer.token({"typ": typ})) == (200, "")


async def test_a_token_is_one_of_the_org_that_registered_its_issuer_alone(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """At any other org it is answered as at an org that does not exist."""
    await registered(owner, issuer)
    token = issuer.token()
    assert await asked(world, token) == (200, "")
    assert await asked(world, token, world.other_id) == (401, "token_issuer")
    assert await asked(world, token, 999_999) == (401, "token_issuer")
    unnamed = await world.front.client(token=token)
    assert told(await unnamed.get("/v1/runs")) == (401, "token_issuer")
    slug = await world.front.client(token=token)
    slug.headers["X-Organization-Id"] = world.slugs[world.org_id]
    assert told(await slug.get("/v1/runs")) == (200, "")


async def test_the_same_somebody_in_two_orgs_is_two_identities_with_the_role_that_each_gives(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    other = await world.owner_of(world.other_id)
    looks = [{"claim": "roles", "values": ["pond-users"], "role": "viewer"}]
    await registered(other, issuer, rules=looks)
    token = issuer.token()
    await world.front.publish("echo")
    for org_id, status in ((world.org_id, 202), (world.other_id, 403)):
        caller = await bearer(world, token, org_id)
        assert (await caller.post("/v1/runs", json={"flow": "echo"})).status_code == status
    rows = await world.owner.fetch("select org_id, identity_id, role from outside_identity")
    assert {row["org_id"]: row["role"] for row in rows} == {
        world.org_id: "builder",
        world.other_id: "viewer",
    }
    assert len({row["identity_id"] for row in rows}) == 2


async def test_the_same_subject_of_two_issuers_is_two_identities(
    world: World, owner: Client, issuer: Issuer
) -> None:
    async with an_issuer() as second:
        await registered(owner, issuer)
        await registered(owner, second)
        claims = {"sub": "ann", "email": "ann@pond.example", "email_verified": True}
        assert await asked(world, issuer.token(**claims)) == (200, "")
        assert await asked(world, second.token(**claims)) == (200, "")
        assert await asked(world, issuer.token(**claims)) == (200, "")
    found = (await owner.get("/v1/outside-identities")).json()["data"]
    assert len(found) == 2
    assert {one["issuer"] for one in found} == {issuer.url, second.url}


async def test_an_operators_address_makes_nobody_an_operator_or_a_member(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    operator = await world.person(is_operator=True)
    member = await world.member("owner")
    for person in (operator, member):
        claims = {
            "email": person.email,
            "email_verified": True,
            "sub": person.subject,
            "operator": True,
            "permissions": ["platform:read", "*"],
            "org": world.org_id,
            "sid": str(person.session_id),
            "v": 1,
            "orgs": [{"id": world.org_id, "slug": "pond", "role": "owner", "v": 1}],
        }
        token = issuer.token(**claims)
        assert await asked(world, token) == (200, "")
        assert await asked(world, token, path="/v1/platform/orgs") == (403, "permission_missing")
        assert await asked(world, token, path="/v1/grants") == (403, "permission_missing")
        me = await (await bearer(world, token)).get("/v1/me")
        assert me.status_code == 403 or me.json()["user"] is None, me.text
    assert await world.count("account") == 3  # the owner's and these two


async def test_unmapped_claims_give_no_role_and_leave_nothing(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    for roles in (None, [], ["other"], "pond-users2", {"pond-users": True}, [["pond-users"]], 1):
        assert await asked(world, issuer.token(roles=roles)) == (403, "role_unmapped")
    assert await asked(world, issuer.token(roles="pond-users")) == (200, "")
    assert await world.count("outside_identity") == 1


async def test_claims_of_another_tenant_of_the_issuer_are_not_of_the_org(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer, org_claim="tid", org_values=["our-tenant"])
    for tid in (None, "their-tenant", "our-tenant2", ["their-tenant"]):
        assert await asked(world, issuer.token(tid=tid)) == (403, "role_unmapped")
    assert await asked(world, issuer.token(tid="our-tenant")) == (200, "")


async def test_deep_claims_and_scopes_are_found(
    world: World, owner: Client, issuer: Issuer
) -> None:
    rules = [
        {"claim": "/realm_access/roles", "values": ["a"], "role": "viewer"},
        {"claim": "https://pond.example/roles", "values": ["b"], "role": "support"},
        {"claim": "scope", "values": ["c"], "role": "analyst"},
        {"claim": "/x~1y/0", "values": ["d"], "role": "admin"},
    ]
    await registered(owner, issuer, rules=rules)
    by_subject: dict[str, dict[str, Any]] = {
        "viewer": {"realm_access": {"roles": ["z", "a"]}},
        "support": {"https://pond.example/roles": "b"},
        "analyst": {"scope": "openid c"},
        "admin": {"x/y": {"0": "d"}},
    }
    for role, claims in by_subject.items():
        assert await asked(world, issuer.token(sub=role, **claims)) == (200, "")
    assert await asked(world, issuer.token(sub="n", **{"realm_access.roles": ["a"]})) == (
        403,
        "role_unmapped",
    )
    found = (await owner.get("/v1/outside-identities")).json()["data"]
    assert {one["outside_subject"]: one["role"] for one in found} == {k: k for k in by_subject}


async def test_a_role_is_what_the_newest_token_says(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """An older token gives back nothing that a newer one took away."""
    await registered(owner, issuer)
    now = int(time.time())
    strong = issuer.token(roles=["pond-admins"], iat=now - 20)
    assert await asked(world, strong, path="/v1/api-keys") == (200, "")
    weak = issuer.token(iat=now - 10)
    assert await asked(world, weak, path="/v1/api-keys") == (403, "permission_missing")
    assert await asked(world, strong, path="/v1/api-keys") == (401, "token_superseded")
    again = issuer.token(roles=["pond-admins"], iat=now)
    assert await asked(world, again, path="/v1/api-keys") == (200, "")
    gone = issuer.token(roles=[], iat=now)
    assert await asked(world, gone) == (403, "role_unmapped")
    assert await asked(world, weak) == (401, "token_superseded")
    actions = await world.owner.fetch("select action from audit where action like 'identity.%'")
    assert [row["action"] for row in actions].count("identity.mapped") == 3


OLDER: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "of another tenant": ({"tid": "theirs", "roles": ["pond-admins"]}, (403, "role_unmapped")),
    "of no tenant": ({"tid": None}, (403, "role_unmapped")),
    "of no role": ({"roles": []}, (403, "role_unmapped")),
    "of a weaker role": ({"roles": ["pond-users"]}, (401, "token_superseded")),
    "of the same role": ({}, (200, "")),
}


@pytest.mark.parametrize("older", OLDER)
async def test_an_older_token_has_no_more_than_its_own_claims_give(
    world: World, owner: Client, issuer: Issuer, older: str
) -> None:
    """What the newest token of the same subject gave lends nothing to an older one."""
    await registered(owner, issuer, org_claim="tid", org_values=["ours"])
    now = int(time.time())
    good = {"tid": "ours", "roles": ["pond-admins"]}
    strong = issuer.token(**good, iat=now)
    assert await asked(world, strong, path="/v1/api-keys") == (200, "")
    changes, answer = OLDER[older]
    token = issuer.token(**{**good, **changes}, iat=now - 20)
    assert await asked(world, token, path="/v1/api-keys") == answer
    assert await asked(world, strong, path="/v1/api-keys") == (200, "")


async def test_only_a_token_that_gives_what_is_stored_keeps_an_identity_seen(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    now = int(time.time())
    long_ago = "update outside_identity set seen_at = now() - interval '31 days'"
    is_seen = "select seen_at > now() - interval '1 day' from outside_identity"
    assert await asked(world, issuer.token(iat=now - 10)) == (200, "")
    await world.owner.execute(long_ago)
    older = issuer.token(roles=["pond-admins"], iat=now - 20)
    assert await asked(world, older) == (401, "token_superseded")
    assert not await world.owner.fetchval(is_seen)
    assert await asked(world, issuer.token(iat=now - 20)) == (200, "")
    assert await world.owner.fetchval(is_seen)
    await world.owner.execute(long_ago)
    assert await asked(world, issuer.token(roles=["pond-admins"], iat=now)) == (200, "")
    assert await world.owner.fetchval(is_seen)  # also where the token gave another role


async def test_keys_that_were_rotated_are_known_and_those_withdrawn_are_not(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    old = issuer.token()
    assert await asked(world, old) == (200, "")
    issuer.rotate("ES256")
    assert await asked(world, issuer.token()) == (401, "token_unknown_key")
    later(world, 10)  # the shortest time between two questions
    assert await asked(world, issuer.token()) == (200, "")
    assert await asked(world, old) == (200, "")  # published still
    issuer.rotate("EdDSA", keep=False)
    later(world, 10)
    assert await asked(world, issuer.token()) == (200, "")
    assert await asked(world, old) == (401, "token_unknown_key")


async def test_a_storm_of_unknown_keys_asks_the_issuer_hardly_more(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    assert await asked(world, issuer.token()) == (200, "")
    issuer.asked.clear()
    later(world, 10)
    forge = Forge(issuer)
    caller = await bearer(world, "")
    forged = [forge.by_stranger(kid=f"k{nth}") for nth in range(200)]
    headers = [{"Authorization": f"Bearer {one}"} for one in forged]
    answers = await asyncio.gather(*[caller.get("/v1/runs", headers=one) for one in headers])
    assert {told(one) for one in answers} == {(401, "token_unknown_key")}
    assert issuer.asked == {"/.well-known/openid-configuration": 1, "/keys": 1}
    assert await asked(world, issuer.token()) == (200, "")


async def test_many_at_once_wait_for_one_answer_of_the_issuer(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    issuer.held = asyncio.Event()
    calls = [asyncio.create_task(asked(world, issuer.token(sub=f"s{n}"))) for n in range(20)]
    await until_asked(issuer)
    await asyncio.sleep(0.3)
    assert issuer.asked == {"/.well-known/openid-configuration": 1}
    issuer.held.set()
    assert set(await asyncio.gather(*calls)) == {(200, "")}
    assert issuer.asked == {"/.well-known/openid-configuration": 1, "/keys": 1}
    assert await world.count("outside_identity") == 20


async def test_an_issuer_that_is_down_is_unavailable_and_known_keys_last_a_while(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    issuer.is_down = True
    caller = await bearer(world, issuer.token())
    response = await caller.get("/v1/runs")
    assert told(response) == (503, "issuer_unavailable")
    assert "retry-after" in response.headers
    issuer.is_down = False
    assert told(await caller.get("/v1/runs")) == (503, "issuer_unavailable")
    assert issuer.asked.total() == 1  # not at once again
    later(world, 10)
    assert told(await caller.get("/v1/runs")) == (200, "")
    issuer.is_down = True
    issuer.asked.clear()
    later(world, 301)  # read again beside the request
    assert told(await caller.get("/v1/runs")) == (200, "")
    await until_asked(issuer)
    later(world, 3600)  # too old
    assert told(await caller.get("/v1/runs")) == (503, "issuer_unavailable")
    issuer.is_down = False
    later(world, 20)  # the second pause after failures
    assert told(await caller.get("/v1/runs")) == (200, "")


async def until_asked(issuer: Issuer) -> None:
    async with asyncio.timeout(20):
        while not issuer.asked:
            await asyncio.sleep(0.01)


async def test_nobody_listening_is_unavailable(world: World, owner: Client, issuer: Issuer) -> None:
    gone = Issuer("http://127.0.0.1:1", keys=issuer.keys)
    await registered(owner, gone)
    assert await asked(world, gone.token()) == (503, "issuer_unavailable")


BENT: dict[str, dict[str, Response]] = {
    "another issuer": {
        "/.well-known/openid-configuration": JSONResponse(
            {"issuer": "https://evil.example", "jwks_uri": "http://127.0.0.1:1/"}
        )
    },
    "no JSON": {"/.well-known/openid-configuration": Response("<html>")},
    "a list": {"/.well-known/openid-configuration": JSONResponse([])},
    "elsewhere": {
        "/.well-known/openid-configuration": Response(
            status_code=302, headers={"location": "https://evil.example/"}
        )
    },
    "too much": {"/.well-known/openid-configuration": Response("x" * 300_000)},
    "no keys": {"/keys": JSONResponse({"keys": []})},
    "keys of the wrong form": {"/keys": JSONResponse({"keys": {"a": 1}})},
    "keys that are none": {"/keys": JSONResponse({"keys": [1, None, {}, {"kty": "RSA", "kid": "x"}]})},
    "secrets": {"/keys": JSONResponse({"keys": [{"kty": "oct", "k": "eHh4", "kid": "x", "alg": "HS256"}]})},
}  # fmt: skip


@pytest.mark.parametrize("bent", BENT)
async def test_an_issuer_whose_documents_are_wrong_is_told_of(
    world: World, owner: Client, issuer: Issuer, bent: str
) -> None:
    made = await registered(owner, issuer)
    issuer.bent = BENT[bent]
    assert await asked(world, issuer.token()) == (503, "issuer_invalid")
    later(world, 10)
    test = (await owner.post(f"/v1/issuers/{made}/test")).json()
    assert (test["is_good"], test["code"], test["keys"]) == (False, "issuer_invalid", [])
    issuer.bent = {}
    later(world, 10)
    test = (await owner.post(f"/v1/issuers/{made}/test")).json()
    assert test["is_good"]
    assert [one["kid"] for one in test["keys"]] == [issuer.keys[0].kid]
    assert await asked(world, issuer.token()) == (200, "")


async def test_keys_at_a_closed_address_are_not_fetched(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await registered(owner, issuer)
    for address in ("https://169.254.169.254/keys", "http://[::1]:1/keys", "file:///etc/passwd"):
        document = {"issuer": issuer.url, "jwks_uri": address}
        issuer.bent = {"/.well-known/openid-configuration": JSONResponse(document)}
        answer = await (await bearer(world, issuer.token())).get("/v1/runs")
        assert told(answer) == (503, "issuer_invalid")
        assert "its address is refused" in answer.text
        later(world, 160)  # the longest pause after failures
    assert issuer.asked["/.well-known/openid-configuration"] == 3


WEAK: dict[str, Callable[[SigningKey], Any]] = {
    "for encryption": lambda k: public_jwk(k.private, "RS256", k.kid, use="enc"),
    "for another operation": lambda k: public_jwk(k.private, "RS256", k.kid, key_ops=["encrypt"]),
    "of another algorithm": lambda k: public_jwk(k.private, "RS512", k.kid),
    "short": lambda k: public_jwk(rsa_key(3, 1024), "RS256", k.kid),
}


@pytest.mark.parametrize("weak", WEAK)
async def test_a_key_that_is_not_for_this_is_not_used(
    world: World, owner: Client, issuer: Issuer, weak: str
) -> None:
    await registered(owner, issuer)
    other = SigningKey.make("ES256")
    published = [WEAK[weak](issuer.keys[0]), public_jwk(other.private, "ES256", other.kid)]
    issuer.bent = {"/keys": JSONResponse({"keys": published})}
    if weak == "short":
        issuer.keys[0] = SigningKey(issuer.keys[0].kid, "RS256", rsa_key(3, 1024))
    assert await asked(world, issuer.token()) == (401, "token_unknown_key")
    issuer.keys = [other]
    assert await asked(world, issuer.token()) == (200, "")


async def test_tokens_are_refused_while_the_plan_has_no_outside_issuers(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """As if the organization did not trust them; it can still take the issuer out."""
    made = await registered(owner, issuer)
    token = issuer.token(roles=["pond-users"])
    assert (await asked(world, token))[0] == 200
    operator = await world.client(await world.person(is_operator=True))
    place = f"/v1/platform/orgs/{world.org_id}/plan"
    await operator.put(place, json={"features": {"outside_issuers": False}})
    assert await asked(world, token) == (401, "token_issuer")
    await operator.put(place, json={})
    assert (await asked(world, token))[0] == 200
    await operator.put(place, json={"features": {"outside_issuers": False}})
    changed = await owner.patch(f"/v1/issuers/{made}", json={"name": "Theirs"})
    assert told(changed) == (402, "feature_off")
    assert (await owner.delete(f"/v1/issuers/{made}")).status_code == 204
