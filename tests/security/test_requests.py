"""Requests that want more than they may: fields that nobody may set, and one key sent fifty times at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from tests.security.conftest import World
from tests.security.test_matrix import DOCUMENT, ROUTES, asked
from tests.security.things import FACTORIES, Bench

FIELDS = ("org_id", "role", "status", "subject", "state", "created_by", "is_operator")


def properties(method: str, path: str) -> set[str] | None:
    """Return the fields of a route's JSON body; None without one."""
    body = DOCUMENT["paths"][path][method.lower()].get("requestBody", {})
    schema = body.get("content", {}).get("application/json", {}).get("schema")
    if schema is None:
        return None
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return set(schema.get("properties", {}))


WITH_BODY = [(m, p) for m, p in ROUTES if properties(m, p) is not None]


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as closing:
        yield Bench(world, await world.owner_of(world.org_id), closing)


def test_there_are_bodies_to_try() -> None:
    assert len(WITH_BODY) > 10


@pytest.mark.parametrize(("method", "path"), WITH_BODY, ids=[f"{m} {p}" for m, p in WITH_BODY])
async def test_fields_that_nobody_may_set_are_refused_by_name(
    bench: Bench, method: str, path: str
) -> None:
    wish = await FACTORIES[method, path](bench)
    person = await bench.world.person(is_operator=True)
    caller = bench.client if "/platform/" not in path else await bench.world.client(person)
    good = wish.json or {}
    for field in set(FIELDS) - (properties(method, path) or set()):
        wish.json = {**good, field: bench.world.other_id}
        response = await asked(caller, method, path, wish)
        assert response.status_code == 422, f"{field}: {response.status_code} {response.text}"
        assert field in response.text


async def test_fifty_identical_requests_with_one_key_make_one_run(world: World) -> None:
    await world.front.publish("echo")
    owner = await world.owner_of(world.org_id)
    answers = await asyncio.gather(
        *(
            owner.post("/v1/runs", json={"flow": "echo"}, headers={"Idempotency-Key": "once"})
            for _ in range(50)
        )
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await world.count("run") == 1
