"""Organizations over HTTP: who may give what to whom, keys and what they may, operators who are let in."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.security.conftest import Person, World, embedder, front, world

from .conftest import Client

__all__ = ["embedder", "front", "world"]


async def keyed(world: World, caller: Client, **wish: Any) -> tuple[dict[str, Any], Client]:
    """Make an API key and a client that sends it."""
    response = await caller.post("/v1/api-keys", json={"name": "k", **wish})
    assert response.status_code == 201, response.text
    made = response.json()
    return made, await world.front.client(token=made["key"])


async def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json().get("code", "")


async def test_a_key_may_what_its_scopes_and_its_owner_both_may_now(world: World) -> None:
    ann = await world.member("builder")
    caller = await world.client(ann)
    boss = await world.owner_of(world.org_id)
    refused = await caller.post("/v1/api-keys", json={"name": "k", "scopes": ["runs:read"]})
    assert refused.status_code == 403  # a builder makes no keys
    service = (
        await boss.post("/v1/service-principals", json={"name": "bot", "role": "builder"})
    ).json()
    made, key = await keyed(
        world, boss, scopes=["runs:read", "members:read"], owner=service["subject"]
    )
    assert (await key.get("/v1/runs")).status_code == 200
    assert (await key.get("/v1/schedules")).status_code == 403  # not among its scopes
    place = f"/v1/service-principals/{service['id']}"
    assert (await boss.patch(place, json={"is_disabled": True})).status_code == 200
    assert (await key.get("/v1/runs")).status_code == 401
    assert (await boss.patch(place, json={"is_disabled": False})).status_code == 200
    assert (await key.get("/v1/runs")).status_code == 200
    shown = (await boss.get(f"/v1/api-keys/{made['id']}")).json()
    assert "key" not in shown
    assert (await boss.delete(f"/v1/api-keys/{made['id']}")).status_code == 204
    assert (await key.get("/v1/runs")).status_code == 401


async def test_a_wrong_an_unknown_and_a_revoked_key_are_told_the_same(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    made, key = await keyed(world, boss, scopes=["runs:read"])
    await boss.delete(f"/v1/api-keys/{made['id']}")
    revoked = (await key.get("/v1/runs")).json()
    texts = [made["key"][:-4] + "0000", made["key"].replace("mpk_1_", "mpk_2_")]
    for text in texts:
        stranger = await world.front.client(token=text)
        answer = await stranger.get("/v1/runs")
        assert answer.status_code == 401
        assert (answer.json()["code"], answer.json()["detail"]) == (
            revoked["code"],
            revoked["detail"],
        )


async def test_nobody_gives_more_than_they_have(world: World) -> None:
    admin = await world.client(await world.member("admin"))
    viewer = str((await world.member("viewer")).user_id)
    owner = str((await world.member("owner")).user_id)
    for path, body in {
        f"/v1/members/{viewer}": {"role": "owner"},
        f"/v1/members/{owner}": {"role": "viewer"},
    }.items():
        assert (await admin.patch(path, json=body)).status_code == 403
    assert (await admin.delete(f"/v1/members/{owner}")).status_code == 403
    wide = {"permissions": ["grants:write"]}
    assert (await admin.put("/v1/roles/wide", json=wide)).status_code == 403
    invite = {"email": "x@x.example", "role": "owner"}
    assert (await admin.post("/v1/invitations", json=invite)).status_code == 403
    bot = {"name": "bot", "role": "owner"}
    assert (await admin.post("/v1/service-principals", json=bot)).status_code == 403
    key = {"name": "k", "scopes": ["grants:write"]}
    assert (await admin.post("/v1/api-keys", json=key)).status_code == 403
    assert (await admin.patch(f"/v1/members/{viewer}", json={"role": "admin"})).status_code == 200


async def test_a_changed_role_ends_what_was_signed_for_the_old_one(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.member("builder")
    caller = await world.client(person)
    assert (await caller.get("/v1/runs")).status_code == 200
    await boss.patch(f"/v1/members/{person.user_id}", json={"role": "viewer"})
    assert await code(await caller.get("/v1/runs")) == (401, "token_stale")


async def test_of_two_owners_who_remove_each_other_one_stays(world: World) -> None:
    people: list[Person] = [await world.member("owner") for _ in range(2)]
    clients = [await world.client(person) for person in people]
    await asyncio.gather(
        clients[0].delete(f"/v1/members/{people[1].user_id}"),
        clients[1].delete(f"/v1/members/{people[0].user_id}"),
    )
    assert await world.count("membership", org_id=world.org_id, role="owner") == 1


async def test_the_last_owner_stays(world: World) -> None:
    person = await world.member("owner")
    caller = await world.client(person)
    path = f"/v1/members/{person.user_id}"
    assert (await caller.delete(path)).status_code == 409
    assert (await caller.patch(path, json={"role": "viewer"})).status_code == 409


async def test_an_operator_sees_an_org_only_while_its_owner_lets_them_in(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.person(is_operator=True)
    operator = await world.client(person)
    there = {"X-Organization-Id": str(world.org_id)}
    assert await code(await operator.get("/v1/runs", headers=there)) == (403, "org_forbidden")
    wish = {"operator_email": person.email, "reason": "a stuck run", "hours": 1}
    grant = (await boss.post("/v1/grants", json=wish)).json()
    assert (await operator.get("/v1/runs", headers=there)).status_code == 200
    nowhere = {"X-Organization-Id": str(world.other_id)}
    assert (await operator.get("/v1/runs", headers=nowhere)).status_code == 403
    for path, body in {
        "/v1/runs": {"flow": "echo"},
        "/v1/api-keys": {"name": "k", "scopes": ["runs:read"]},
        "/v1/grants": wish,
    }.items():
        assert (await operator.post(path, headers=there, json=body)).status_code == 403
    assert (await boss.delete(f"/v1/grants/{grant['id']}")).status_code == 204
    assert (await operator.get("/v1/runs", headers=there)).status_code == 403


async def test_a_suspended_org_is_closed_to_its_own_owner(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    operator = await world.client(await world.person(is_operator=True))
    path = f"/v1/platform/orgs/{world.org_id}"
    body = {"is_suspended": True, "reason": "unpaid"}
    assert (await operator.patch(path, json=body)).status_code == 200
    assert await code(await boss.get("/v1/runs")) == (403, "org_suspended")
    assert (await operator.patch(path, json={"is_suspended": False})).status_code == 200
    assert (await boss.get("/v1/runs")).status_code == 200


async def test_changes_are_told_in_the_audit_log_by_who_made_them(world: World) -> None:
    person = await world.member("owner")
    caller = await world.client(person)
    await caller.put("/v1/roles/reader", json={"permissions": ["runs:read"]})
    other = await world.member("viewer")
    await caller.patch(f"/v1/members/{other.user_id}", json={"role": "reader"})
    rows = await world.owner.fetch("select subject, action, resource from audit order by at")
    assert {row["subject"] for row in rows} == {person.subject}
    assert [row["action"] for row in rows] == ["role.created", "member.role_changed"]


async def test_queued_work_of_a_suspended_org_waits_and_its_own_pause_stays(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    operator = await world.client(await world.person(is_operator=True))
    path = f"/v1/platform/orgs/{world.org_id}"
    suspended = {"is_suspended": True, "reason": "unpaid"}
    await operator.patch(path, json=suspended)
    assert await world.count("pause", org_id=world.org_id, paused_by="platform:suspension") == 1
    await operator.patch(path, json={"is_suspended": False})
    assert await world.count("pause", org_id=world.org_id) == 0
    assert (await boss.post("/v1/org/pause", json={})).status_code == 200
    await operator.patch(path, json=suspended)
    await operator.patch(path, json={"is_suspended": False})
    assert await world.count("pause", org_id=world.org_id) == 1
