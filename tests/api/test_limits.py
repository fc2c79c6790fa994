"""Limits over HTTP: set, listed, removed; who sees which; keys of runs; why a run waits for room."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.security.conftest import World, world

from .conftest import Client, Front, until

__all__ = ["world"]


async def put(client: Client, path: str = "/v1/limits", **body: Any) -> Any:
    answer = await client.put(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def listed(client: Client, path: str = "/v1/limits") -> dict[str, Any]:
    return {one["id"]: one for one in (await client.get(path)).json()["data"]}


async def test_an_org_sets_replaces_and_removes_its_limits(front: Front, ann: Client) -> None:
    made = await put(ann, key="integration:crm", maximum=5)
    assert (made["id"], made["maximum"]) == ("concurrency integration:crm", 5)
    assert (made["is_of_platform"], made["set_by"]) == (False, "user:ann")
    await put(ann, key="integration:crm", maximum=2)
    rate = await put(ann, key="integration:crm", kind="rate", maximum=60, period_s=60.0, burst=3)
    assert (rate["period_s"], rate["burst"]) == (60.0, 3)
    assert {name: one["maximum"] for name, one in (await listed(ann)).items()} == {
        "concurrency integration:crm": 2,
        "rate integration:crm": 60,
    }
    gone = await ann.delete("/v1/limits", params={"key": "integration:crm", "kind": "rate"})
    assert gone.status_code == 204
    again = await ann.delete("/v1/limits", params={"key": "integration:crm", "kind": "rate"})
    assert (again.status_code, again.json()["code"]) == (404, "limit_not_found")
    assert list(await listed(ann)) == ["concurrency integration:crm"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"key": "crm", "maximum": 1}, "key"),
        ({"key": "org:*", "maximum": 1}, "key"),
        ({"key": "model:m", "maximum": -1}, "maximum"),
        ({"key": "model:m", "maximum": 1, "kind": "rate"}, "period_s"),
        ({"key": "model:m", "maximum": 1, "burst": 2}, "burst"),
        ({"key": "model:m", "maximum": 1, "period_s": 2.0}, "period_s"),
        ({"key": "tokens:*", "maximum": 1}, "key"),
        ({"key": "model:m x model:n", "maximum": 1}, "key"),
        ({"key": "model:m", "maximum": 200_000, "kind": "rate", "period_s": 1.0}, "maximum"),
    ],
)
async def test_what_does_not_fit_is_refused_by_its_field(
    front: Front, ann: Client, body: dict[str, Any], param: str
) -> None:
    refused = await ann.put("/v1/limits", json=body)
    problem = refused.json()
    assert (refused.status_code, problem["error"]["param"]) == (422, param)
    if body["maximum"] >= 0:
        assert problem["advice"]


async def test_a_limit_that_an_earlier_release_let_be_set_can_be_removed(world: World) -> None:
    """Tokens were no kind then but a noun as any other; none is set any more, and none need stay."""
    one, operator = (
        await world.owner_of(world.org_id),
        await world.client(await world.person(is_operator=True)),
    )
    await world.owner.execute(
        "insert into org_limit (org_id, key, kind, maximum, set_by)"
        " values ($1, 'tokens:*', 'concurrency', 3, 'user:ann')",
        world.org_id,
    )
    await world.owner.execute(
        "insert into platform_limit (key, kind, maximum, set_by) values ('tokens:*', 'concurrency', 3, 'user:ann')"
    )
    for client, path in ((one, "/v1/limits"), (operator, "/v1/platform/limits")):
        assert "concurrency tokens:*" in await listed(client, path)
        refused = await client.put(path, json={"key": "tokens:*", "maximum": 2})
        assert refused.status_code == 422
        gone = await client.delete(path, params={"key": "tokens:*"})
        assert gone.status_code == 204, gone.text
    assert await listed(one) == {}


async def test_an_org_sees_what_holds_for_it_and_nothing_of_others(world: World) -> None:
    operator = await world.client(await world.person(is_operator=True))
    one, other = await world.owner_of(world.org_id), await world.owner_of(world.other_id)
    slug = world.slugs[world.org_id]
    path = "/v1/platform/limits"
    await put(operator, path, key="provider:openai", maximum=20)
    await put(operator, path, key=f"org:{slug} x provider:openai", maximum=9)
    await put(one, key="model:mine", maximum=1)
    await put(one, key=f"org:{slug}", maximum=7)
    shared, named = "concurrency provider:openai", f"concurrency org:{slug}×provider:openai"
    mine = {"concurrency model:mine", f"concurrency org:{slug}"}
    assert set(await listed(one)) == {*mine, shared, named}
    assert set(await listed(other)) == {shared}
    assert (await listed(other))[shared]["set_by"] == "operator"
    assert (await listed(operator, path))[shared]["set_by"].startswith("user:")
    assert set(await listed(operator, path)) == {shared, named}
    refused = await one.delete("/v1/limits", params={"key": "provider:openai"})
    assert refused.status_code == 404
    unknown = await operator.put(path, json={"key": "org:nobody-here", "maximum": 1})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "org_not_found")


async def test_a_run_has_the_keys_of_its_flow_and_those_given(front: Front, ann: Client) -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def hold(_ctx: Any, _: Any) -> None:
        began.set()
        await may_end.wait()

    front.flow(hold, keys=["provider:openai"])
    await put(ann, key="model:m", maximum=1)
    await put(ann, key="provider:openai", maximum=5)
    async with front.worker():
        assert (await ann.get("/v1/flows/hold")).json()["keys"] == ["provider:openai"]
        body = {"flow": "hold", "keys": ["model:m"]}
        first = (await ann.post("/v1/runs", json=body)).json()["id"]
        await began.wait()
        second = (await ann.post("/v1/runs", json=body)).json()["id"]
        async with asyncio.timeout(20):
            while "limit" not in (why := await reasons(ann, second)):
                await asyncio.sleep(0.02)
        full = why["limit"]
        assert (full["key"], full["in_use"], full["maximum"]) == ("model:m", 1, 1)
        assert (full["set_by"], full["is_exact"], full["holders"]) == ("org", True, [first])
        assert "model:m has no room: 1 of 1 places" in full["text"]
        assert why["in_line"]["ahead"] == 0
        page = (await ann.get("/v1/limits/saturation")).json()
        full = {one["id"]: one for one in page["data"]}["limit own concurrency model:m model:m"]
        assert (full["in_use"], full["maximum"], full["own"], full["waiting"]) == (1, 1, 1, 1)
        assert (full["limit"], full["is_of_platform"], full["is_exact"]) == ("model:m", False, True)
        assert {one["of"] for one in page["data"]} == {"org", "queue", "limit"}
        (queue,) = (await ann.get("/v1/queues")).json()["data"]
        assert (queue["queued"], queue["running"]) == (1, 1)
        await put(ann, key="model:m", maximum=2)
        await until(ann, second, "run.started")
        may_end.set()
        assert (await front.ended(ann, second))["state"] == "succeeded"


async def reasons(client: Client, run_id: str) -> dict[str, Any]:
    answer = (await client.get(f"/v1/runs/{run_id}/why")).json()
    return {one["kind"]: one for one in answer["reasons"]}


async def test_all_limits_in_the_way_are_named_with_until_when(front: Front, ann: Client) -> None:
    async def never(_ctx: Any, _: Any) -> None:
        raise AssertionError

    front.flow(never)
    await put(ann, key="model:closed", maximum=0)
    await put(ann, key="integration:slow", kind="rate", maximum=1, period_s=3600.0)
    async with front.worker():
        keys = ["integration:slow"]
        first = (await ann.post("/v1/runs", json={"flow": "never", "keys": keys})).json()["id"]
        await until(ann, first, "run.started")
        body = {"flow": "never", "keys": [*keys, "model:closed"]}
        run_id = (await ann.post("/v1/runs", json=body)).json()["id"]
        async with asyncio.timeout(20):
            while True:
                answer = (await ann.get(f"/v1/runs/{run_id}/why")).json()
                full = {one["key"]: one for one in answer["reasons"] if one["kind"] == "limit"}
                if len(full) == 2:
                    break
                await asyncio.sleep(0.02)
    assert full["model:closed"]["maximum"] == 0
    assert full["integration:slow"]["until"] is not None
    assert "No more starts on integration:slow until" in answer["text"]


@pytest.mark.parametrize("key", ["org:x", "flow:x", "queue:x", "model:*", "model", "model:a b"])
async def test_what_is_no_key_of_a_run_is_refused(front: Front, ann: Client, key: str) -> None:
    await front.publish()
    refused = await ann.post("/v1/runs", json={"flow": "echo", "keys": [key]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "keys")
