"""What plans switch off, and how much of what stands until it is deleted: refused with 402, told in quotas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tests.security.conftest import World, embedder, front, world
from tests.security.test_matrix import asked
from tests.security.things import FACTORIES, Bench

from millpond.engine.features import FEATURES
from millpond.identity.holdings import HOLDINGS

from .conftest import Client

__all__ = ["embedder", "front", "world"]

# What makes one more of each thing that can be limited.
MAKES: Mapping[str, tuple[str, str]] = {
    "knowledge_bases": ("POST", "/v1/knowledge-bases/{name}/documents"),
    "documents": ("POST", "/v1/knowledge-bases/{name}/documents"),
    "storage_bytes": ("POST", "/v1/knowledge-bases/{name}/documents"),
    "members": ("POST", "/v1/invitations"),
    "api_keys": ("POST", "/v1/api-keys"),
    "service_principals": ("POST", "/v1/service-principals"),
    "custom_roles": ("PUT", "/v1/roles/{name}"),
    "outside_issuers": ("POST", "/v1/issuers"),
    "schedules": ("POST", "/v1/schedules"),
    "triggers": ("POST", "/v1/triggers"),
    "secrets": ("POST", "/v1/secrets"),
}
# Every route that a feature's absence closes.
CLOSED = [
    ("knowledge", "POST", "/v1/knowledge-bases/{name}/documents"),
    ("knowledge", "POST", "/v1/knowledge-bases/{name}/search"),
    *[
        (f"{kind}s", method, path)
        for kind in ("schedule", "trigger")
        for method, path in (
            ("POST", f"/v1/{kind}s"),
            ("PATCH", f"/v1/{kind}s/{{{kind}_id}}"),
            ("POST", f"/v1/{kind}s/{{{kind}_id}}/resume"),
        )
    ],
    ("schedules", "POST", "/v1/schedules/{schedule_id}/run_now"),
    ("secrets", "POST", "/v1/secrets"),
    ("secrets", "PUT", "/v1/secrets/{name}"),
    ("custom_roles", "PUT", "/v1/roles/{name}"),
    ("outside_issuers", "POST", "/v1/issuers"),
]
# What stands can be seen and removed all the same.
OPEN = [
    ("knowledge", "GET", "/v1/knowledge-bases"),
    ("schedules", "DELETE", "/v1/schedules/{schedule_id}"),
    ("schedules", "POST", "/v1/schedules/{schedule_id}/pause"),
    ("triggers", "DELETE", "/v1/triggers/{trigger_id}"),
    ("secrets", "DELETE", "/v1/secrets/{name}"),
    ("custom_roles", "DELETE", "/v1/roles/{name}"),
    ("outside_issuers", "DELETE", "/v1/issuers/{issuer_id}"),
    ("outside_issuers", "PATCH", "/v1/issuers/{issuer_id}"),
]


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as closing:
        yield Bench(world, await world.owner_of(world.org_id), closing)


@pytest.fixture
async def operator(world: World) -> Client:
    return await world.client(await world.person(is_operator=True))


async def give(operator: Client, org_id: int, **plan: Any) -> dict[str, Any]:
    """Give an org limits or features of its own; returns its quotas."""
    given = await operator.put(f"/v1/platform/orgs/{org_id}/plan", json=plan)
    assert given.status_code == 200, given.text
    answer: dict[str, Any] = given.json()
    return answer


def test_everything_that_can_be_limited_or_switched_off_is_tried() -> None:
    assert set(MAKES) == set(HOLDINGS)
    assert {feature for feature, _, _ in CLOSED} == set(FEATURES)


@pytest.mark.parametrize("quota", MAKES)
async def test_one_more_than_the_plan_allows_is_refused_and_nothing_is_stored(
    bench: Bench, operator: Client, quota: str
) -> None:
    method, path = MAKES[quota]
    wish = await FACTORIES[method, path](bench)
    if quota == "knowledge_bases":
        wish.path = {"name": "one-more"}
    org_id = bench.world.org_id
    [seen] = (await give(operator, org_id, overrides={quota: 10**9}))["quotas"]
    assert (seen["quota"], seen["maximum"], seen["renews_at"]) == (quota, 10**9, None)
    await give(operator, org_id, overrides={quota: seen["used"]})
    refused = await asked(bench.client, method, path, wish)
    assert refused.status_code == 402, refused.text
    problem = refused.json()
    assert (problem["code"], problem["quota"]) == ("quota_exceeded", quota)
    assert (problem["used"] > seen["used"], problem["maximum"]) == (True, seen["used"])
    assert "renews_at" not in problem
    [after] = (await bench.client.get("/v1/quotas")).json()["quotas"]
    assert after["used"] == seen["used"]
    more = problem["used"]
    await give(operator, org_id, overrides={quota: more})
    assert (await asked(bench.client, method, path, wish)).status_code < 300
    [after] = (await bench.client.get("/v1/quotas")).json()["quotas"]
    assert after["used"] == more


@pytest.mark.parametrize(
    ("feature", "method", "path"), CLOSED, ids=[f"{m} {p}" for _, m, p in CLOSED]
)
async def test_what_a_plan_has_switched_off_is_refused_until_it_is_on(
    bench: Bench, operator: Client, feature: str, method: str, path: str
) -> None:
    wish = await FACTORIES[method, path](bench)
    org_id = bench.world.org_id
    body = {"limits": {}, "features": {feature: False}}
    assert (await operator.put("/v1/platform/plans/small", json=body)).status_code == 200
    shown = await give(operator, org_id, plan="small")
    assert shown["features"] == {one: one != feature for one in FEATURES}
    refused = await asked(bench.client, method, path, wish)
    assert refused.status_code == 402, refused.text
    problem = refused.json()
    assert (problem["code"], problem["feature"]) == ("feature_off", feature)
    # An org may have of its own what its plan has not.
    shown = await give(operator, org_id, plan="small", features={feature: True})
    assert shown["features"] == dict.fromkeys(FEATURES, True)
    assert shown["feature_overrides"] == {feature: True}
    answer = await asked(bench.client, method, path, wish)
    assert answer.status_code < 300, answer.text


@pytest.mark.parametrize(("feature", "method", "path"), OPEN, ids=[f"{m} {p}" for _, m, p in OPEN])
async def test_what_stands_is_seen_and_removed_while_its_feature_is_off(
    bench: Bench, operator: Client, feature: str, method: str, path: str
) -> None:
    wish = await FACTORIES[method, path](bench)
    await give(operator, bench.world.org_id, features={feature: False})
    answer = await asked(bench.client, method, path, wish)
    assert answer.status_code < 300, answer.text


async def test_another_org_keeps_what_is_switched_off_for_one(
    bench: Bench, operator: Client
) -> None:
    await give(operator, bench.world.org_id, features={"secrets": False})
    other = await bench.world.owner_of(bench.world.other_id)
    body = {"name": "key", "value": "a value"}
    assert (await bench.client.post("/v1/secrets", json=body)).status_code == 402
    assert (await other.post("/v1/secrets", json=body)).status_code == 201


async def test_features_that_nobody_knows_are_refused(bench: Bench, operator: Client) -> None:
    place = f"/v1/platform/orgs/{bench.world.org_id}/plan"
    for path in ("/v1/platform/plans/odd", place):
        refused = await operator.put(path, json={"features": {"teleport": False}})
        assert refused.status_code == 422
        assert refused.json()["error"]["param"] == "features.teleport"


async def test_a_place_that_was_taken_meanwhile_is_refused_to_who_was_invited(
    bench: Bench, operator: Client
) -> None:
    """Members and open invitations are counted together, so that whoever was asked finds their place free."""
    org_id = bench.world.org_id
    [seen] = (await give(operator, org_id, overrides={"members": 10**9}))["quotas"]
    await give(operator, org_id, overrides={"members": seen["used"] + 1})
    wish = await FACTORIES["POST", "/v1/invitations"](bench)
    first = await bench.client.post("/v1/invitations", json=wish.json)
    assert first.status_code == 201, first.text
    again = {**wish.json, "email": "one-more@x.example"}
    assert (await bench.client.post("/v1/invitations", json=again)).status_code == 402
    await bench.client.delete(f"/v1/invitations/{first.json()['id']}")
    assert (await bench.client.post("/v1/invitations", json=again)).status_code == 201
