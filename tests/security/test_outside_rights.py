"""Rights of outside identities: what ends them, who may give them, and that no door beside leads further."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.api.conftest import Client, until
from tests.issuer import AUDIENCE, Issuer, an_issuer
from tests.security.conftest import World
from tests.security.test_outside_issuers import RULES, asked, bearer, registered, told

from millpond.api import sse
from millpond.engine.context import Context
from millpond.engine.registry import step
from millpond.engine.step_context import StepContext
from millpond.identity import bearers


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with an_issuer() as served:
        yield served


@pytest.fixture
async def owner(world: World) -> Client:
    return await world.owner_of(world.org_id)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask about open streams every 50 ms, so that a test need not wait for the period."""
    defaults = {**(sse.EventStream.__init__.__kwdefaults__ or {}), "check_s": 0.05}
    monkeypatch.setattr(sse.EventStream.__init__, "__kwdefaults__", defaults)


async def identity(owner: Client) -> str:
    """Return the id of the newest identity."""
    found: str = (await owner.get("/v1/outside-identities")).json()["data"][0]["id"]
    return found


async def key_of(world: World, identity_id: str) -> Client:
    """Open a client with a key that an identity owns; the API lets none be made."""
    text, made = bearers.make(bearers.KEY, world.org_id)
    await world.owner.execute(
        """insert into api_key (org_id, key_id, name, prefix, digest, owner, scopes, created_by)
           values ($1, gen_random_uuid(), 'k', $2, $3, $4, '{runs:read}', $4)""",
        world.org_id,
        made.prefix,
        made.digest,
        f"outside:{identity_id}",
    )
    return await world.front.client(token=text)


async def end(owner: Client, made: str, how: str) -> None:
    """Take away what an identity of the registered issuer stands on."""
    path, body = f"/v1/issuers/{made}", None
    match how:
        case "issuer disabled":
            body = {"is_disabled": True}
        case "rules changed":
            body = {"rules": [RULES[0]]}
        case "audience narrowed":
            body = {"audiences": ["https://other.example"]}
        case "algorithms narrowed":
            body = {"algorithms": ["ES256"]}
        case "tenant named":
            body = {"org_claim": "tid", "org_values": ["x"]}
        case "identity disabled":
            path, body = f"/v1/outside-identities/{await identity(owner)}", {"is_disabled": True}
    sent = owner.delete(path) if body is None else owner.patch(path, json=body)
    response = await sent
    assert response.status_code < 300, response.text


AFTER = {
    "issuer removed": (401, "token_issuer"),
    "issuer disabled": (401, "token_issuer"),
    "rules changed": (403, "role_unmapped"),
    "tenant named": (403, "role_unmapped"),
    "audience narrowed": (401, "token_audience"),
    "algorithms narrowed": (401, "token_algorithm"),
    "identity disabled": (403, "identity_disabled"),
}


@pytest.mark.parametrize("how", AFTER)
async def test_what_is_taken_away_stops_the_next_request_and_open_streams(
    world: World, owner: Client, issuer: Issuer, how: str
) -> None:
    made = await registered(owner, issuer)
    await world.front.publish("echo")
    run = (await owner.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    token = issuer.token()
    caller = await bearer(world, token)
    words = []
    async with asyncio.timeout(30), caller.sse(f"/v1/runs/{run}/events") as source:
        async for message in source:
            words.append(message)
            if message.event == "run.queued":
                await end(owner, made, how)
    assert [one.event for one in words] == ["run.queued", "closed"]
    assert json.loads(words[-1].data)["reason"] == "token_stale"
    assert await asked(world, token) == AFTER[how]


@pytest.mark.parametrize("how", AFTER)
async def test_a_transaction_that_is_about_to_begin_is_refused(
    world: World, owner: Client, issuer: Issuer, how: str
) -> None:
    """Between the look at the token and the transaction of the deed: the database has the last word."""
    made = await registered(owner, issuer)
    from millpond.identity.gate import Wish

    ports = world.front.app.state.ports
    principal = await ports.gate.admit(issuer.token(), Wish(org=str(world.org_id)))
    async with ports.db.of(principal):
        pass
    await end(owner, made, how)
    with pytest.raises(Exception, match="changed or was taken away"):
        async with ports.db.of(principal):
            pass


async def test_a_stream_ends_with_its_token(world: World, owner: Client, issuer: Issuer) -> None:
    await registered(owner, issuer)
    await world.front.publish("echo")
    run = (await owner.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    caller = await bearer(world, issuer.token(exp=int(time.time()) + 1))
    words = []
    async with asyncio.timeout(30), caller.sse(f"/v1/runs/{run}/events") as source:
        async for message in source:
            words.append(message)
    assert json.loads(words[-1].data)["reason"] == "token_expired"


@pytest.mark.parametrize("whose", ["ours", "another issuer's"])
async def test_a_stream_ends_with_its_token_also_when_what_was_remembered_of_it_is_gone(
    world: World, owner: Client, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """Keys are read again, or too many tokens come, between its being admitted and the stream's beginning."""
    await registered(owner, issuer)
    await world.front.publish("echo")
    run = (await owner.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    ports = world.front.app.state.ports
    limits = ports.reserver.limits

    async def meanwhile(org_id: int) -> Any:
        ports.gate.keyring._verified.clear()
        ports.outside._good.clear()
        return await limits(org_id)

    monkeypatch.setattr(ports.reserver, "limits", meanwhile)
    passport = (await world.member("owner")).passport()
    token = issuer.token(exp=int(time.time()) + 2)
    if whose == "ours":
        token = world.front.keyring.mint_access(passport, 2)
    caller = await bearer(world, token)
    words = []
    async with asyncio.timeout(15), caller.sse(f"/v1/runs/{run}/events") as source:
        async for message in source:
            words.append(message)
    assert json.loads(words[-1].data)["reason"] == "token_expired"


async def test_an_issuer_that_comes_back_gives_nothing_to_those_who_do_not(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """Removed and registered again, with other rules: nobody has what the old ones gave."""
    made = await registered(owner, issuer)
    admin = await bearer(world, issuer.token(roles=["pond-admins"]))
    assert told(await admin.get("/v1/api-keys")) == (200, "")
    by_key = await key_of(world, await identity(owner))
    assert told(await by_key.get("/v1/runs")) == (200, "")
    await end(owner, made, "issuer removed")
    assert told(await by_key.get("/v1/runs")) == (401, "key_refused")
    looks = [{"claim": "roles", "values": ["pond-admins"], "role": "viewer"}]
    await registered(owner, issuer, rules=looks)
    assert told(await by_key.get("/v1/runs")) == (401, "key_refused")
    assert told(await admin.get("/v1/api-keys")) == (403, "permission_missing")
    assert told(await by_key.get("/v1/runs")) == (200, "")
    assert await world.count("outside_identity") == 1


@pytest.mark.parametrize(
    "change",
    [
        "update outside_identity set disabled_at = now()",
        "update outside_identity set role = null",
        "update outside_identity set seen_at = now() - interval '31 days'",
        "update issuer set disabled_at = now()",
        "delete from issuer",
    ],
)
async def test_a_key_stands_on_the_identity_that_owns_it(
    world: World, owner: Client, issuer: Issuer, change: str
) -> None:
    await registered(owner, issuer)
    admin = await bearer(world, issuer.token(roles=["pond-admins"]))
    wish = {"name": "k", "scopes": ["runs:read"]}
    assert told(await admin.post("/v1/api-keys", json=wish)) == (422, "key_owner")
    by_key = await key_of(world, await identity(owner))
    assert told(await by_key.get("/v1/runs")) == (200, "")
    await world.owner.execute(change)
    assert told(await by_key.get("/v1/runs")) == (401, "key_refused")


async def test_a_run_is_asked_again_before_each_step_with_an_effect(
    world: World, owner: Client, issuer: Issuer
) -> None:
    made = await registered(owner, issuer)
    reached, opened, effects = asyncio.Event(), asyncio.Event(), []

    async def act(ctx: Context, _: Any) -> None:
        effects.append("before")
        await ctx.step(hold)
        await ctx.step(write)

    @step("hold", registry=world.front.registry)
    async def hold(_: StepContext) -> None:
        reached.set()
        await opened.wait()

    @step("write", registry=world.front.registry)
    async def write(_: StepContext) -> None:
        effects.append("after")

    world.front.flow(act, name="act")
    caller = await bearer(world, issuer.token())
    async with world.front.worker():
        accepted = await caller.post("/v1/runs", json={"flow": "act"})
        assert accepted.status_code == 202, accepted.text
        await asyncio.wait_for(reached.wait(), 20)
        await end(owner, made, "rules changed")
        opened.set()
        run = await world.front.ended(owner, accepted.json()["id"])
    assert effects == ["before"]
    assert (run["state"], run["error"]["code"]) == ("failed", "right_revoked")
    subject = await world.owner.fetchval("select subject from audit where action = 'run.refused'")
    assert subject == f"outside:{await identity(owner)}"


async def test_nobody_decides_on_a_run_that_they_started_from_outside(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """Also not by a newer token, or through a key of theirs; somebody else of the issuer may."""
    rules = [{"claim": "roles", "values": ["pond-users"], "role": "support"},
             {"claim": "roles", "values": ["pond-admins"], "role": "admin"}]  # fmt: skip
    await registered(owner, issuer, rules=rules)

    async def approve(ctx: Context, _: Any) -> Any:
        return (await ctx.ask_human("approve", role="support", form=dict, title="Send it?")).answer

    world.front.flow(approve, name="approve")
    ann = await bearer(world, issuer.token())
    async with world.front.worker():
        run = (await ann.post("/v1/runs", json={"flow": "approve"})).json()["id"]
        await until(ann, run, "run.awaiting_input")
        (asked_of,) = (await ann.get("/v1/input-requests")).json()["data"]
        path = f"/v1/input-requests/{asked_of['id']}/resolve"
        again = await bearer(world, issuer.token(jti="another"))
        for client in (ann, again):
            assert told(await client.post(path, json={"answer": {}})) == (403, "own_run")
        ben = await bearer(world, issuer.token(sub="ben"))
        done = await ben.post(path, json={"answer": {}})
        assert done.status_code == 200, done.text
        await world.front.ended(owner, run)
    resolved = await world.owner.fetchval(
        "select subject from audit where action = 'input.resolved'"
    )
    assert resolved == f"outside:{await identity(owner)}"


async def test_nobody_lets_an_issuer_give_more_than_they_could(
    world: World, owner: Client, issuer: Issuer
) -> None:
    """Neither by a rule of theirs, nor by changing an issuer that gives more."""
    gives = [{"claim": "roles", "values": ["bosses"], "role": "owner"}]
    by_owner = await registered(owner, issuer, rules=gives)
    admin = await world.client(await world.member("admin"))
    narrow = await world.client(await world.member({"issuers:write", "issuers:read"}))
    for client, role, code in (
        (admin, "owner", "owners_only"),
        (narrow, "viewer", "above_own_rights"),
        (narrow, "owner", "owners_only"),
    ):
        rules = [{"claim": "roles", "values": ["x"], "role": role}]
        body = {"name": "x", "url": "http://127.0.0.1:9/", "audiences": ["x"], "rules": rules}
        assert told(await client.post("/v1/issuers", json=body)) == (403, code)
    path = f"/v1/issuers/{by_owner}"
    for body in ({"audiences": ["mine"]}, {"rules": []}, {"is_disabled": True}, {"name": "y"}):
        assert told(await admin.patch(path, json=body)) == (403, "owners_only")
    assert told(await admin.delete(path)) == (403, "owners_only")
    assert await asked(world, issuer.token(roles=["bosses"]), path="/v1/grants") == (200, "")
    boss = f"/v1/outside-identities/{await identity(owner)}"
    disabled = await admin.patch(boss, json={"is_disabled": True})
    assert told(disabled) == (403, "owners_only")


async def test_a_custom_role_is_given_and_follows_its_changes(
    world: World, owner: Client, issuer: Issuer
) -> None:
    await owner.put("/v1/roles/clerks", json={"permissions": ["runs:read"]})
    rules = [{"claim": "roles", "values": ["pond-users"], "role": "clerks"}]
    await registered(owner, issuer, rules=rules)
    token = issuer.token()
    assert await asked(world, token) == (200, "")
    assert await asked(world, token, path="/v1/members") == (403, "permission_missing")
    assert told(await owner.delete("/v1/roles/clerks")) == (409, "role_in_use")
    await owner.put("/v1/roles/clerks", json={"permissions": ["members:read"]})
    assert await asked(world, token, path="/v1/members") == (200, "")
    assert await asked(world, token) == (403, "permission_missing")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"url": "http://10.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/"}, "url"),
        ({"url": "ftp://x.example/"}, "url"),
        ({"url": "https://x.example/?a=b"}, "url"),
        ({"url": "https://u:p@x.example/"}, "url"),
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": ["none"]}, "algorithms"),
        ({"algorithms": []}, "algorithms"),
        ({"audiences": []}, "audiences"),
        ({"rules": [{"claim": "a", "values": ["b"], "role": "nobody"}]}, "rules"),
        ({"rules": [{"claim": "a", "values": ["b"], "role": "operator"}]}, "rules"),
        ({"rules": [{"claim": "/~2", "values": ["b"], "role": "viewer"}]}, "rules"),
        ({"org_claim": "tid"}, "org_claim"),
        ({"org_values": ["x"]}, "org_claim"),
        ({"org_id": 1}, "org_id"),
        ({"is_operator": True}, "is_operator"),
    ],
)
async def test_what_cannot_be_an_issuer_is_refused(
    world: World, owner: Client, body: dict[str, Any], param: str
) -> None:
    good = {"name": "x", "url": "http://127.0.0.1:9/", "audiences": ["x"], "rules": RULES}
    response = await owner.post("/v1/issuers", json={**good, **body})
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"].split(".")[0] == param
    assert await world.count("issuer") == 0


async def test_an_address_is_registered_once_and_so_many_in_all(
    world: World, owner: Client
) -> None:
    body = {"name": "x", "url": "http://127.0.0.1:9/0", "audiences": [AUDIENCE], "rules": RULES}
    for nth in range(20):
        made = await owner.post("/v1/issuers", json={**body, "url": f"http://127.0.0.1:9/{nth}"})
        assert made.status_code == 201
    assert told(await owner.post("/v1/issuers", json=body)) == (409, "too_many_issuers")
    await owner.delete(f"/v1/issuers/{made.json()['id']}")
    assert told(await owner.post("/v1/issuers", json=body)) == (409, "issuer_known")
    listed = (await owner.get("/v1/issuers", params={"limit": 5})).json()
    assert [one["url"][-2:] for one in listed["data"]] == ["18", "17", "16", "15", "14"]
    one = (await owner.get("/v1/issuers", params={"url": body["url"]})).json()["data"]
    assert [one["url"] for one in one] == [body["url"]]
