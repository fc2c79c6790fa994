"""Idempotency-Key: one run per key, whatever happens at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from millpond.api.accept import digest_of
from millpond.api.models import StartRun

from .conftest import ALL, Client, Front

BODY = {"flow": "echo", "input": {"a": 1, "b": [2]}, "labels": {"x": "y"}}


async def post(client: Client, key: str, body: Any = None) -> httpx2.Response:
    return await client.post("/v1/runs", json=body or BODY, headers={"Idempotency-Key": key})


async def count(front: Front, table: str = "run") -> int:
    async with front.engine_db.duty("test") as con:
        number: int = await con.fetchval(f"select count(*) from {table}")
    return number


async def test_repeat_gives_the_first_answer_again(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, "k1")
    again = await post(ann, "k1")
    assert first.status_code == again.status_code == 202
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert await count(front) == 1


async def test_answer_is_the_first_one_after_the_run_went_on(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        return given

    front.flow(echo)
    async with front.worker():
        first = await post(ann, "k1")
        assert (await front.ended(ann, first.json()["id"]))["state"] == "succeeded"
        again = await post(ann, "k1")
    assert again.json() == first.json()


async def test_same_body_in_other_words_is_the_same(front: Front, ann: Client) -> None:
    await front.publish()
    first = await post(ann, "k1")
    same = {"labels": {"x": "y"}, "priority": 0, "input": {"b": [2], "a": 1}, "flow": "echo"}
    assert (await post(ann, "k1", same)).json() == first.json()


async def test_a_key_from_before_urgency_and_tokens_is_known_again(
    front: Front, ann: Client
) -> None:
    """Fields that came later and are not set make no other request of the same body."""
    await front.publish()
    first = await post(ann, "k1")
    old = StartRun(**BODY).model_dump(exclude={"urgency", "tokens"})
    async with front.db.org(front.org_id) as con:
        stored = await con.fetchval("select digest from idempotency")
    assert stored == digest_of(old)
    assert (await post(ann, "k1", {**BODY, "urgency": "standard"})).status_code == 422
    assert (await post(ann, "k1")).json() == first.json()


@pytest.mark.parametrize(
    "other",
    [
        {**BODY, "input": {"a": 2}},
        {**BODY, "priority": 1},
        {**BODY, "flow": "other"},
        {**BODY, "delay_s": 5},
        {**BODY, "version": 1},
    ],
)
async def test_another_body_is_refused(front: Front, ann: Client, other: dict[str, Any]) -> None:
    await front.publish()
    await front.publish("other")
    assert (await post(ann, "k1")).status_code == 202
    response = await post(ann, "k1", other)
    assert response.status_code == 422
    assert response.json()["code"] == "idempotency_key_reused"
    assert await count(front) == 1


async def test_keys_of_others_are_others(front: Front, ann: Client, other_org: int) -> None:
    await front.publish()
    bob = await front.client(subject="user:bob")
    stranger = await front.client(org_id=other_org)
    ids = [(await post(caller, "k1")).json()["id"] for caller in (ann, bob, stranger)]
    assert len(set(ids)) == 3


async def test_no_key_no_memory(front: Front, ann: Client) -> None:
    await front.publish()
    for _ in range(2):
        await ann.post("/v1/runs", json=BODY)
    assert await count(front) == 2
    assert await count_keys(front) == 0


async def count_keys(front: Front) -> int:
    async with front.db.org(front.org_id) as con:
        number: int = await con.fetchval("select count(*) from idempotency")
    return number


async def test_rivals_with_one_key_make_one_run(front: Front, ann: Client) -> None:
    await front.publish()
    responses = await asyncio.gather(*(post(ann, "k1") for _ in range(24)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    replayed = [r for r in responses if "idempotency-replayed" in r.headers]
    assert len(replayed) == 23
    assert await count(front) == 1


async def test_rivals_with_one_key_and_two_bodies(front: Front, ann: Client) -> None:
    await front.publish()
    bodies = [{**BODY, "priority": number % 2} for number in range(16)]
    responses = await asyncio.gather(*(post(ann, "k1", body) for body in bodies))
    assert sorted({response.status_code for response in responses}) == [202, 422]
    assert len({r.json()["id"] for r in responses if r.status_code == 202}) == 1
    assert sum(r.status_code == 202 for r in responses) == 8
    assert await count(front) == 1


async def test_repeat_is_authorized_again(front: Front, ann: Client) -> None:
    await front.publish(permission="echo:run")
    allowed = await front.client(permissions=ALL | {"echo:run"})
    assert (await post(allowed, "k1")).status_code == 202
    assert (await post(ann, "k1")).status_code == 403
    without = await front.client(permissions=frozenset({"runs:read"}))
    assert (await post(without, "k1")).status_code == 403


async def test_repeat_survives_a_newer_version(front: Front, ann: Client) -> None:
    await front.publish(schema={"type": "object"})
    first = await post(ann, "k1")
    await front.publish(version=2, schema={"type": "string"})
    await front.app.state.ports.catalog._fresh(0.0)
    again = await post(ann, "k1")
    assert again.status_code == 202
    assert again.json() == first.json()
    assert (await post(ann, "k2")).status_code == 422


async def test_refused_request_leaves_its_key_free(front: Front, ann: Client) -> None:
    await front.publish(schema={"type": "object", "required": ["b"]})
    assert (await post(ann, "k1", {"flow": "echo", "input": {}})).status_code == 422
    assert (await post(ann, "k1")).status_code == 202


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tinside", "ünï"])
async def test_malformed_key(front: Front, ann: Client, key: str) -> None:
    await front.publish()
    response = await ann.post(
        "/v1/runs", json=BODY, headers=[(b"Idempotency-Key", key.encode("utf-8"))]
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert await count(front) == 0


@pytest.mark.parametrize("key", ["x", "x" * 255, '"quoted key"', "a:b/c?d=e"])
async def test_wellformed_key(front: Front, ann: Client, key: str) -> None:
    await front.publish()
    assert (await post(ann, key)).json()["id"] == (await post(ann, key)).json()["id"]


async def test_many_keys_at_once_each_make_one_run(front: Front, ann: Client) -> None:
    await front.publish()
    bob = await front.client(subject="user:bob")
    keys = [f"k{number % 10}" for number in range(60)]
    callers = [ann, bob]
    responses = await asyncio.gather(
        *(post(callers[number % 2], key) for number, key in enumerate(keys)),
        *(ann.post("/v1/runs", json=BODY) for _ in range(5)),
    )
    assert {response.status_code for response in responses} == {202}
    runs = {
        (n % 2, key): r.json()["id"]
        for n, (key, r) in enumerate(zip(keys, responses, strict=False))
    }
    for number, (key, response) in enumerate(zip(keys, responses, strict=False)):
        assert response.json()["id"] == runs[number % 2, key]
    assert await count(front) == len(set(runs.values())) + 5
