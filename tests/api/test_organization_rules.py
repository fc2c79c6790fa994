"""The rules of organizations over HTTP: refusals, custom roles, keys' lives, operators, fields that nobody may set."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.security.conftest import World, embedder, front, world

from millpond.identity.permissions import ROLES

from .conftest import DEADLINE_S, Client

__all__ = ["embedder", "front", "world"]

SOME_ID = "0199aaaa-0000-7000-8000-000000000000"


def told(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


async def made_key(boss: Client, **wish: Any) -> dict[str, Any]:
    response = await boss.post("/v1/api-keys", json={"name": "k", **wish})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


BODIES = {
    "POST /v1/invitations": {"email": "a@x.example", "role": "viewer"},
    "PUT /v1/roles/reader": {"permissions": []},
    "POST /v1/service-principals": {"name": "bot", "role": "viewer"},
    "POST /v1/api-keys": {"name": "k", "scopes": ["runs:read"]},
    "POST /v1/grants": {"operator_email": "op@x.example", "reason": "r", "hours": 1},
    "PATCH /v1/org": {"name": "n"},
    "PATCH /v1/members/{id}": {"role": "viewer"},
    "PATCH /v1/service-principals/{id}": {"name": "b"},
}


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("field", ["org_id", "status", "is_operator", "granted_by", "version"])
async def test_fields_that_nobody_may_set_are_refused_by_name(
    world: World, route: str, field: str
) -> None:
    boss = await world.owner_of(world.org_id)
    method, _, path = route.partition(" ")
    body = {**BODIES[route], field: 1}
    refused = await boss.request(method, path.replace("{id}", SOME_ID), json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == field


async def test_a_custom_role_gives_what_it_names_and_is_changed_for_all_who_hold_it(
    world: World,
) -> None:
    boss, person = await world.owner_of(world.org_id), await world.member("viewer")
    wish = {"description": "Reads.", "permissions": ["runs:read", "members:read"]}
    made = await boss.put("/v1/roles/reader", json=wish)
    assert (made.status_code, made.json()["is_built_in"]) == (200, False)
    bot = {"name": "bot", "role": "reader"}
    service = (await boss.post("/v1/service-principals", json=bot)).json()
    key = await made_key(boss, scopes=["runs:read", "members:read"], owner=service["subject"])
    program = await world.front.client(token=key["key"])
    member = f"/v1/members/{person.user_id}"
    assert (await boss.patch(member, json={"role": "reader"})).status_code == 200
    assert (await program.get("/v1/members")).status_code == 200
    version = await world.owner.fetchval(
        "select version from membership where user_id = $1", person.user_id
    )
    await boss.put("/v1/roles/reader", json={"permissions": ["runs:read"]})
    assert (await program.get("/v1/members")).status_code == 403
    assert (await program.get("/v1/runs")).status_code == 200
    assert version < await world.owner.fetchval(
        "select version from membership where user_id = $1", person.user_id
    )
    assert told(await boss.delete("/v1/roles/reader")) == (409, "role_in_use")
    await boss.patch(member, json={"role": "viewer"})
    await boss.patch(f"/v1/service-principals/{service['id']}", json={"role": "viewer"})
    assert (await boss.delete("/v1/roles/reader")).status_code == 204
    assert (await boss.delete("/v1/roles/reader")).status_code == 404


async def test_roles_refuse_built_in_names_bad_names_and_words_that_are_no_permission(
    world: World,
) -> None:
    boss = await world.owner_of(world.org_id)
    for name in ROLES:
        answer = await boss.put(f"/v1/roles/{name}", json={"permissions": []})
        assert told(answer) == (409, "role_built_in")
        assert told(await boss.delete(f"/v1/roles/{name}")) == (409, "role_built_in")
    for name in ("Reader", "1st", "a b", "é"):
        assert (await boss.put(f"/v1/roles/{name}", json={"permissions": []})).status_code == 422
    for word in ("platform:write", "metrics:read", "*", "runs:explode"):
        answer = await boss.put("/v1/roles/reader", json={"permissions": [word]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "permissions")
    unknown = await boss.patch(f"/v1/members/{SOME_ID}", json={"role": "viewer"})
    assert unknown.status_code == 404


async def test_nobody_takes_what_is_above_them(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    await boss.put("/v1/roles/letter-in", json={"permissions": ["grants:write"]})
    bot = {"name": "bot", "role": "owner"}
    service = (await boss.post("/v1/service-principals", json=bot)).json()
    holder = await world.member("viewer")
    member = f"/v1/members/{holder.user_id}"
    await boss.patch(member, json={"role": "letter-in"})
    invited = await boss.post("/v1/invitations", json={"email": "b@x.example", "role": "owner"})
    admin = await world.client(await world.member("admin"))
    for answer in (
        await admin.patch(member, json={"role": "viewer"}),
        await admin.delete(member),
        await admin.put("/v1/roles/letter-in", json={"permissions": []}),
        await admin.delete("/v1/roles/letter-in"),
        await admin.patch(f"/v1/service-principals/{service['id']}", json={"name": "x"}),
        await admin.delete(f"/v1/invitations/{invited.json()['id']}"),
        await admin.post(f"/v1/invitations/{invited.json()['id']}/resend"),
        await admin.post("/v1/invitations", json={"email": "b@x.example", "role": "viewer"}),
    ):
        assert answer.status_code == 403, answer.text
        assert answer.json()["code"] in {"above_own_rights", "owners_only"}


async def test_who_leaves_needs_no_right_and_is_out_at_once(world: World) -> None:
    person, other = await world.member("viewer"), await world.member("viewer")
    caller = await world.client(person)
    denied = await caller.delete(f"/v1/members/{other.user_id}")
    assert told(denied) == (403, "permission_missing")
    assert (await caller.delete(f"/v1/members/{person.user_id}")).status_code == 204
    assert told(await caller.get("/v1/members")) == (401, "token_stale")
    actions = await world.owner.fetch("select action from audit")
    assert [row["action"] for row in actions] == ["member.left"]


async def test_a_demoted_owner_who_waited_for_a_turn_does_nothing_more(world: World) -> None:
    """Two owners demote each other at once: the second is refused, since its rights are gone."""
    people = [await world.member("owner") for _ in range(2)]
    clients = [await world.client(person) for person in people]
    answers = await asyncio.gather(
        clients[0].patch(f"/v1/members/{people[1].user_id}", json={"role": "viewer"}),
        clients[1].patch(f"/v1/members/{people[0].user_id}", json={"role": "viewer"}),
    )
    assert sorted(answer.status_code for answer in answers) == [200, 401]
    assert await world.count("membership", org_id=world.org_id, role="owner") == 1


async def test_a_key_of_a_person_follows_their_role_and_leaves_with_them(world: World) -> None:
    boss, person = await world.owner_of(world.org_id), await world.member("admin")
    key = await made_key(await world.client(person), scopes=["runs:read", "members:write"])
    assert key["owner"] == person.subject
    program = await world.front.client(token=key["key"])
    wish = {"email": "b@x.example", "role": "nobody"}
    assert (await program.post("/v1/invitations", json=wish)).status_code == 422
    await boss.patch(f"/v1/members/{person.user_id}", json={"role": "viewer"})
    assert (await program.get("/v1/runs")).status_code == 200
    assert (await program.post("/v1/invitations", json=wish)).status_code == 403
    await boss.delete(f"/v1/members/{person.user_id}")
    assert told(await program.get("/v1/runs")) == (401, "key_refused")


async def test_an_expired_key_is_refused_like_an_unknown_one(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    key = await made_key(boss, scopes=["runs:read"], expires_in_days=1)
    program = await world.front.client(token=key["key"])
    assert (await program.get("/v1/runs")).status_code == 200
    await world.owner.execute("update api_key set expires_at = now()")
    assert told(await program.get("/v1/runs")) == (401, "key_refused")
    good = await boss.get("/v1/api-keys", params={"only_good": "true"})
    assert good.json()["data"] == []


async def test_a_key_speaks_for_its_own_org_alone(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    key = await made_key(boss, scopes=["runs:read"])
    program = await world.front.client(token=key["key"])
    own = (str(world.org_id), world.slugs[world.org_id])
    for name in own:
        answer = await program.get("/v1/runs", headers={"X-Organization-Id": name})
        assert answer.status_code == 200
    for name in (str(world.other_id), world.slugs[world.other_id], "999999", "nowhere"):
        answer = await program.get("/v1/runs", headers={"X-Organization-Id": name})
        assert told(answer) == (403, "org_forbidden")


async def test_a_key_reaches_nothing_of_the_platform_and_mints_nothing_above_it(
    world: World,
) -> None:
    boss = await world.owner_of(world.org_id)
    refused = await boss.post("/v1/api-keys", json={"name": "k", "scopes": ["platform:read"]})
    assert refused.status_code == 422
    key = await made_key(boss, scopes=["keys:write", "runs:read"])
    program = await world.front.client(token=key["key"])
    for path in ("/v1/platform/orgs", "/v1/platform/operators"):
        assert told(await program.get(path)) == (403, "permission_missing")
    wide = await program.post("/v1/api-keys", json={"name": "k", "scopes": ["runs:start"]})
    assert told(wide) == (403, "above_own_rights")
    child = await made_key(program, scopes=["runs:read"])
    assert child["owner"] == key["owner"]
    another = {"name": "k", "scopes": ["runs:read"], "owner": f"user:{SOME_ID}"}
    assert told(await boss.post("/v1/api-keys", json=another)) == (422, "key_owner")


async def test_the_use_of_a_key_is_remembered_and_its_secret_is_nowhere(world: World) -> None:
    boss = await world.owner_of(world.org_id)
    key = await made_key(boss, scopes=["runs:read"])
    assert key["used_at"] is None
    program = await world.front.client(token=key["key"])
    await program.get("/v1/runs")

    async def used() -> str:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                shown = (await boss.get(f"/v1/api-keys/{key['id']}")).json()
                if shown["used_at"] is not None:
                    return str(shown["used_at"])

    first = await used()
    await program.get("/v1/runs")
    assert await used() == first  # within the minute
    secret = key["key"].rpartition("_")[2]
    for table in ("api_key", "audit"):
        text = await world.owner.fetchval(f"select string_agg(t::text, ' ') from {table} t")
        assert secret not in text


async def test_keys_and_service_principals_of_another_org_do_not_exist(world: World) -> None:
    boss, stranger = await world.owner_of(world.org_id), await world.owner_of(world.other_id)
    bot = {"name": "bot", "role": "viewer"}
    service = (await boss.post("/v1/service-principals", json=bot)).json()
    theirs = {"name": "k", "scopes": ["runs:read"], "owner": service["subject"]}
    assert told(await stranger.post("/v1/api-keys", json=theirs)) == (422, "key_owner")
    assert (await stranger.post("/v1/service-principals", json=bot)).status_code == 201
    assert told(await boss.post("/v1/service-principals", json=bot)) == (409, "name_taken")


async def test_the_platform_keeps_an_operator_and_its_log_tells_of_changes(world: World) -> None:
    person, other = await world.person(is_operator=True), await world.person()
    operator = await world.client(person)
    mine = f"/v1/platform/operators/{person.user_id}"
    assert told(await operator.delete(mine)) == (409, "last_operator")
    added = await operator.post("/v1/platform/operators", json={"email": other.email})
    assert (added.status_code, added.json()["id"]) == (201, str(other.user_id))
    unknown = await operator.post("/v1/platform/operators", json={"email": "no@x.example"})
    assert told(unknown) == (422, "account_unknown")
    assert (await operator.delete(mine)).status_code == 204
    assert (await operator.get("/v1/platform/orgs")).status_code == 401
    rows = await world.owner.fetch("select subject, action from platform_audit order by at")
    assert [row["action"] for row in rows] == ["operator.added", "operator.removed"]
    assert {row["subject"] for row in rows} == {person.subject}


async def test_two_operators_who_remove_each_other_leave_one(world: World) -> None:
    people = [await world.person(is_operator=True) for _ in range(2)]
    clients = [await world.client(person) for person in people]
    await asyncio.gather(
        clients[0].delete(f"/v1/platform/operators/{people[1].user_id}"),
        clients[1].delete(f"/v1/platform/operators/{people[0].user_id}"),
    )
    assert await world.count("account", is_operator=True) == 1


async def test_orgs_are_paged_and_filtered_by_operators(world: World) -> None:
    operator = await world.client(await world.person(is_operator=True))
    for n in range(3):
        await operator.post("/v1/platform/orgs", json={"slug": f"o{n}", "name": "x"})
    first = (await operator.get("/v1/platform/orgs", params={"limit": 2})).json()
    assert ([one["slug"] for one in first["data"]], first["has_more"]) == (["o2", "o1"], True)
    after = {"limit": 2, "after": first["last_id"]}
    rest = (await operator.get("/v1/platform/orgs", params=after)).json()
    assert rest["data"][0]["slug"] == "o0"
    back = {"limit": 1, "before": rest["first_id"]}
    assert [
        one["slug"] for one in (await operator.get("/v1/platform/orgs", params=back)).json()["data"]
    ] == ["o1"]
    place = f"/v1/platform/orgs/{first['data'][0]['id']}"
    assert (await operator.patch(place, json={"is_suspended": True})).status_code == 422
    await operator.patch(place, json={"is_suspended": True, "reason": "unpaid"})
    held = await operator.get("/v1/platform/orgs", params={"is_suspended": "true"})
    assert [one["suspended_reason"] for one in held.json()["data"]] == ["unpaid"]


async def test_a_grant_that_lets_write_still_opens_no_rights_and_names_both_people(
    world: World,
) -> None:
    owner, person = await world.member("owner"), await world.person(is_operator=True)
    boss, operator = await world.client(owner), await world.client(person)
    there = {"X-Organization-Id": world.slugs[world.org_id]}
    wish = {"operator_email": person.email, "reason": "fix", "hours": 72, "read_only": False}
    assert (await boss.post("/v1/grants", json={**wish, "hours": 73})).status_code == 422
    admin = await world.client(await world.member("admin"))
    assert (await admin.post("/v1/grants", json=wish)).status_code == 403
    nobody = {**wish, "operator_email": (await world.person()).email}
    assert told(await boss.post("/v1/grants", json=nobody)) == (422, "operator_unknown")
    assert (await boss.post("/v1/grants", json=wish)).status_code == 201
    await world.front.publish()
    started = await operator.post("/v1/runs", headers=there, json={"flow": "echo"})
    assert started.status_code == 202
    for method, path, body in (
        ("POST", "/v1/api-keys", {"name": "k", "scopes": ["runs:read"]}),
        ("POST", "/v1/invitations", {"email": "b@x.example", "role": "viewer"}),
        ("PATCH", "/v1/org", {"name": "mine"}),
        ("GET", "/v1/service-principals", None),
        ("POST", f"/v1/input-requests/{SOME_ID}/resolve", {"answer": {}}),
    ):
        answer = await operator.request(method, path, headers=there, json=body)
        assert told(answer) == (403, "permission_missing")
    run = started.json()["id"]
    assert (await operator.post(f"/v1/runs/{run}/cancel", headers=there)).status_code < 300
    rows = await world.owner.fetch(
        "select subject, granted_by from audit where action = 'run.cancelled' and resource = $1",
        f"run:{run}",
    )
    assert [(row["subject"], row["granted_by"]) for row in rows] == [
        (person.subject, owner.subject)
    ]
    # Every row that the operator's deeds left in the org's log names both; the org's own people are named alone.
    rows = await world.owner.fetch(
        "select subject, granted_by from audit where org_id = $1", world.org_id
    )
    named = {(row["subject"], row["granted_by"]) for row in rows}
    assert named == {(person.subject, owner.subject), (owner.subject, None)}
    row = await world.owner.fetchrow("select subject, granted_by from run")
    assert (row["subject"], row["granted_by"]) == (person.subject, owner.subject)
    await world.owner.execute("update access_grant set expires_at = now()")
    assert told(await operator.get("/v1/runs", headers=there)) == (403, "org_forbidden")
