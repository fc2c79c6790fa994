"""Leaving: keys, sessions and grants of somebody who left an org or the operators are over for good."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx2
from tests.security.conftest import Person, World, embedder, front, world

from millpond.types import new_id

from .conftest import Client

__all__ = ["embedder", "front", "world"]


async def key_of(world: World, person: Person) -> tuple[str, Client]:
    caller = await world.client(person)
    made = await caller.post("/v1/api-keys", json={"name": "k", "scopes": ["runs:read"]})
    assert made.status_code == 201, made.text
    return made.json()["id"], await world.front.client(token=made.json()["key"])


async def seated_again(world: World, person: Person, role: str = "owner") -> Client:
    """Let somebody back in as an invitation does, and sign them in anew."""
    stamp: int = await world.owner.fetchval(
        "insert into membership (org_id, user_id, role, version, added_by) "
        "values ($1, $2, $3, nextval('rights_version'), 'test') returning version",
        world.org_id,
        person.user_id,
        role,
    )
    seats = [replace(seat, stamp=stamp, role=role) for seat in person.seats]
    return await world.client(replace(person, seats=seats))


async def test_keys_and_tokens_of_a_member_who_was_removed_do_not_come_back_with_them(
    world: World,
) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.member("owner")
    before = await world.client(person)
    key_id, key = await key_of(world, person)
    kept_id, kept = await key_of(world, await world.member("owner"))
    assert (await key.get("/v1/runs")).status_code == 200
    assert (await boss.delete(f"/v1/members/{person.user_id}")).status_code == 204
    assert (await key.get("/v1/runs")).status_code == 401
    assert (await before.get("/v1/runs")).status_code == 401

    again = await seated_again(world, person)
    assert (await again.get("/v1/runs")).status_code == 200
    assert (await key.get("/v1/runs")).json()["code"] == "key_refused"
    assert (await before.get("/v1/runs")).json()["code"] == "token_stale"
    shown = (await again.get(f"/v1/api-keys/{key_id}")).json()
    assert shown["revoked_at"] is not None
    assert (await kept.get("/v1/runs")).status_code == 200  # of somebody else
    assert (await boss.get(f"/v1/api-keys/{kept_id}")).json()["revoked_at"] is None
    log = (await boss.get("/v1/audit", params={"action": "api_key.revoked"})).json()["data"]
    assert [row["resource"] for row in log] == [f"key:{key_id}"]
    assert log[0]["details"]["why"] == "member.removed"


async def test_who_leaves_by_themselves_takes_no_key_along(world: World) -> None:
    await world.owner_of(world.org_id)
    person = await world.member("owner")
    _, key = await key_of(world, person)
    me = await world.client(person)
    assert (await me.delete(f"/v1/members/{person.user_id}")).status_code == 204
    await seated_again(world, person)
    assert (await key.get("/v1/runs")).status_code == 401


async def test_keys_that_a_member_made_for_a_program_stay(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.member("owner")
    caller = await world.client(person)
    bot = (await caller.post("/v1/service-principals", json={"name": "b", "role": "viewer"})).json()
    wish = {"name": "k", "scopes": ["runs:read"], "owner": bot["subject"]}
    made = (await caller.post("/v1/api-keys", json=wish)).json()
    assert (await boss.delete(f"/v1/members/{person.user_id}")).status_code == 204
    key = await world.front.client(token=made["key"])
    assert (await key.get("/v1/runs")).status_code == 200


async def test_a_key_made_while_its_owner_is_removed_is_good_for_nothing(world: World) -> None:
    """Whichever of the two comes first; the removal is held back more each time, so that keys are made too."""
    boss = await world.owner_of(world.org_id)
    made_count = 0

    async def removal(path: str, after_s: float) -> httpx2.Response:
        await asyncio.sleep(after_s)
        return await boss.delete(path)

    for nth in range(8):
        person = await world.member("owner")
        caller = await world.client(person)
        wish = {"name": "k", "scopes": ["runs:read"]}
        made, removed = await asyncio.gather(
            caller.post("/v1/api-keys", json=wish),
            removal(f"/v1/members/{person.user_id}", nth * nth * 0.005),
        )
        assert removed.status_code == 204
        await seated_again(world, person)
        if made.status_code == 201:
            made_count += 1
            key = await world.front.client(token=made.json()["key"])
            assert (await key.get("/v1/runs")).status_code == 401
    assert made_count >= 1


async def test_grants_of_an_operator_who_was_removed_do_not_come_back_with_the_right(
    world: World,
) -> None:
    boss = await world.owner_of(world.org_id)
    other_boss = await world.owner_of(world.other_id)
    chief = await world.client(await world.person(is_operator=True))
    person, colleague = [await world.person(is_operator=True) for _ in range(2)]
    grants = {}
    for owner, org_id in ((boss, world.org_id), (other_boss, world.other_id)):
        for who in (person, colleague):
            wish = {"operator_email": who.email, "reason": "a look", "hours": 1}
            made = await owner.post("/v1/grants", json=wish)
            assert made.status_code == 201, made.text
            grants[org_id, who.email] = made.json()["id"]
    removed = await chief.delete(f"/v1/platform/operators/{person.user_id}")
    assert removed.status_code == 204
    added = await chief.post("/v1/platform/operators", json={"email": person.email})
    assert added.status_code < 300
    stamp: int = await world.owner.fetchval(
        "select version from account where user_id = $1", person.user_id
    )
    passport = replace(person.passport(), stamp=stamp)
    back = await world.front.client(token=world.front.keyring.mint_access(passport, 600))
    assert (await back.get("/v1/platform/orgs")).status_code == 200
    still = await world.client(colleague)
    for owner, org_id in ((boss, world.org_id), (other_boss, world.other_id)):
        there = {"X-Organization-Id": str(org_id)}
        refused = await back.get("/v1/runs", headers=there)
        assert refused.json()["code"] == "org_forbidden"
        assert (await still.get("/v1/runs", headers=there)).status_code == 200
        shown = (await owner.get(f"/v1/grants/{grants[org_id, person.email]}")).json()
        assert shown["ended_at"] is not None
        log = (await owner.get("/v1/audit", params={"action": "grant.ended"})).json()["data"]
        assert [row["resource"] for row in log] == [f"grant:{grants[org_id, person.email]}"]


async def test_the_application_cannot_end_the_grants_of_an_operator(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.person(is_operator=True)
    wish = {"operator_email": person.email, "reason": "a look", "hours": 1}
    await boss.post("/v1/grants", json=wish)
    async with world.front.db.org(world.other_id) as con:
        assert await con.fetch("select * from end_grants_of($1)", person.user_id) == []
        assert await con.fetch("select * from end_grants_of($1)", new_id()) == []
    row = await world.owner.fetchrow(
        "select ended_at from access_grant where operator_id = $1", person.user_id
    )
    assert row["ended_at"] is None
