"""Every route × nobody, a lower role, another org, the right role: generated from the OpenAPI document.

Each cell is asked of a thing that exists, made by a factory of `things`. The answer for another org's thing equals
that for a thing that does not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from tests.api.conftest import Client, Front
from tests.api.test_auth import api_routes
from tests.security.conftest import World, weakest_without
from tests.security.things import FACTORIES, SOME_ID, Bench, Wish

from millpond.api.auth import PUBLIC, SIGNED_IN, Requires
from millpond.identity.passport import ORG_HEADER

GOLDEN = Path(__file__).parents[1] / "golden" / "openapi.json"
DOCUMENT = json.loads(GOLDEN.read_text(encoding="utf-8"))
ROUTES = [
    (method.upper(), path)
    for path, operations in DOCUMENT["paths"].items()
    for method in operations
    if path not in PUBLIC | SIGNED_IN
]
# What is asked about where no thing is named is answered to whoever asks, with their own org's.
PLACES = re.compile(r"\{(\w+)\}")


def test_every_route_has_a_factory() -> None:
    missing = [f"{method} {path}" for method, path in ROUTES if (method, path) not in FACTORIES]
    assert not missing, f"tests/security/things.py makes nothing for {missing}"


def test_every_factory_has_a_route() -> None:
    assert set(FACTORIES) <= set(ROUTES)


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    """An owner of the org that things are made in."""
    async with AsyncExitStack() as closing:
        yield Bench(world, await world.owner_of(world.org_id), closing)


def needed(front: Front, method: str, path: str) -> Requires:
    """Return what a route declares."""
    for route in api_routes(front.app):
        if isinstance(route, APIRoute) and route.path_format == path and method in route.methods:
            (declared,) = _requirements(route.dependant)
            return declared
    raise AssertionError(f"{method} {path} is not served")


def _requirements(dependant: Dependant) -> Iterator[Requires]:
    if isinstance(dependant.call, Requires):
        yield dependant.call
    for inner in dependant.dependencies:
        yield from _requirements(inner)


async def asked(client: Client, method: str, path: str, wish: Wish, **path_of: str) -> Any:
    names = {**wish.path, **path_of}
    filled = PLACES.sub(lambda found: names[found[1]], path)
    return await client.request(
        method,
        filled,
        json=wish.json,
        content=wish.content,
        params=wish.params,
        headers=wish.headers,
    )


def told(response: httpx2.Response, *names: str) -> tuple[int, str]:
    """Return what an answer tells, whatever id it was asked about and whenever."""
    text = response.text
    for name in names:
        text = text.replace(name, "?")
    text = re.sub(r'"(request_id|instance)":"[^"]*"', "", text)
    return response.status_code, text


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[f"{m} {p}" for m, p in ROUTES])
async def test_a_route_answers_each_caller_as_it_should(
    bench: Bench, method: str, path: str
) -> None:
    world = bench.world
    with structlog.testing.capture_logs() as logs:
        wish = await FACTORIES[method, path](bench)
        declared = needed(world.front, method, path)

        nobody = await asked(await world.client(None), method, path, wish)
        assert (nobody.status_code, nobody.json()["code"]) == (401, "token_missing")

        if declared.is_of_platform:
            lower, right = await world.member("owner"), await world.person(is_operator=True)
        else:
            lower = await world.member(weakest_without(declared.permission))
            right = await world.member(
                {declared.permission, *wish.also}
                if declared.permission != "inputs:resolve"
                else "support"
            )
            await _asked_from_elsewhere(world, method, path, wish)

        refused = await asked(await world.client(lower), method, path, wish)
        assert (refused.status_code, refused.json()["code"]) == (403, "permission_missing")

        await _asked_by_who_was_signed_out(world, declared, method, path, wish)

        good = await asked(await world.client(right), method, path, wish)
        assert 200 <= good.status_code < 300, good.text
        if method == "GET":  # else the other org's answer would prove nothing
            assert all(secret in good.text for secret in wish.makes), good.text
    assert [log for log in logs if log["event"] in {"request.failed", "request.crashed"}] == []


async def _asked_by_who_was_signed_out(
    world: World, declared: Requires, method: str, path: str, wish: Wish
) -> None:
    """Ask with a token that is good by itself, of a session that was ended."""
    if declared.is_of_platform:
        person = await world.person(is_operator=True)
    else:
        person = await world.member("owner")
    await world.owner.execute(
        "update login_session set revoked_at = now(), revoked_why = 'test' where session_id = $1",
        person.session_id,
    )
    stale = await asked(await world.client(person), method, path, wish)
    assert (stale.status_code, stale.json()["code"]) == (401, "token_stale")


async def _asked_from_elsewhere(world: World, method: str, path: str, wish: Wish) -> None:
    """Ask as the owner of another org: a thing named is unknown, and nothing of it is shown, whatever org is named."""
    stranger = await world.owner_of(world.other_id)
    there = replace(wish, headers={**wish.headers, ORG_HEADER: world.slugs[world.org_id]})
    refused = await asked(stranger, method, path, there)
    assert (refused.status_code, refused.json()["code"]) == (403, "org_forbidden")
    answer = await asked(stranger, method, path, wish)
    for secret in wish.makes:
        assert secret not in answer.text
    names = {} if wish.is_for_all else wish.path
    if not names:
        assert wish.makes or wish.is_for_all or method != "GET" or wish.is_own, "nothing is shown"
        return
    missing = {name: SOME_ID if name.endswith("_id") else "never-made" for name in names}
    unknown = await asked(stranger, method, path, wish, **missing)
    assert told(answer, *names.values()) == told(unknown, *missing.values())
    assert answer.status_code == 404
