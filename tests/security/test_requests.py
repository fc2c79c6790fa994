"""Requests that want more than they may: fields that nobody may set, and one key sent fifty times at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from tests.security.conftest import World
from tests.security.people_things import PUBLIC_ENTRIES, SIGNED_IN_ENTRIES, street
from tests.security.test_matrix import DOCUMENT, ROUTES, asked
from tests.security.test_matrix_people import asked as asked_by_people
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


def objects(schema: dict[str, Any], place: str, found: dict[str, bool]) -> None:
    """Find every object with named fields in the schema of a body, and whether it refuses others."""
    if "$ref" in schema:
        place = schema["$ref"].rsplit("/", 1)[1]
        if place in found:
            return
        schema = DOCUMENT["components"]["schemas"][place]
    if "properties" in schema:
        found[place] = schema.get("additionalProperties") is False
    inner = {f"{place}.{name}": one for name, one in schema.get("properties", {}).items()}
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            inner[f"{place} {word}"] = schema[word]
    for word in ("anyOf", "allOf", "oneOf"):
        inner |= {f"{place} {word} {nth}": one for nth, one in enumerate(schema.get(word, ()))}
    for name, one in inner.items():
        objects(one, name, found)


def test_no_object_in_a_body_takes_fields_that_it_does_not_name() -> None:
    """Also those inside others, such as the runs of a batch, or an organization's policy."""
    found: dict[str, bool] = {}
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                objects(content.get("schema", {}), f"{method} {path} {kind}", found)
    assert len(found) > 40
    assert [place for place, refuses in found.items() if not refuses] == []


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


WITHOUT_PERMISSION = [
    (method, path)
    for method, path in sorted({**PUBLIC_ENTRIES, **SIGNED_IN_ENTRIES})
    if path in DOCUMENT["paths"] and properties(method, path) is not None
]


def test_there_are_bodies_of_public_routes_to_try() -> None:
    assert len(WITHOUT_PERMISSION) > 8
    assert {("POST", "/v1/auth/register/confirm"), ("PATCH", "/v1/me")} <= set(WITHOUT_PERMISSION)


@pytest.mark.parametrize(
    ("method", "path"), WITHOUT_PERMISSION, ids=[f"{m} {p}" for m, p in WITHOUT_PERMISSION]
)
async def test_fields_that_nobody_may_set_are_refused_where_no_permission_is_needed(
    world: World, method: str, path: str
) -> None:
    """What is good but for the field is refused, and good without it afterwards: nothing was done or used up."""
    at = await street(world)
    is_public = (method, path) in PUBLIC_ENTRIES
    made = await ({**PUBLIC_ENTRIES, **SIGNED_IN_ENTRIES}[method, path])(at)
    client = at.nobody if is_public else at.client
    for field in set(FIELDS) - (properties(method, path) or set()):
        wish = replace(made.good, json={**(made.good.json or {}), field: world.other_id})
        response = await asked_by_people(client, method, path, wish)
        assert response.status_code == 422, f"{field}: {response.status_code} {response.text}"
        assert field in response.text
    good = await asked_by_people(client, method, path, made.good)
    assert good.status_code == made.status, good.text


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
