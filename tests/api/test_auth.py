"""Who calls and what they may, on every route."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from millpond.api.auth import PUBLIC, SIGNED_IN, Requires, SignedIn

from .conftest import ALL, Client, Front

SOME_ID = "0199aaaa-0000-7000-8000-000000000000"


def api_routes(app: FastAPI) -> Iterator[Any]:
    """Walk all routes, also those of included routers."""
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop()
        if hasattr(route, "original_router"):
            waiting.extend(route.original_router.routes)
        else:
            yield route


def permissions(dependant: Dependant) -> list[str]:
    found = [dependant.call.permission] if isinstance(dependant.call, Requires) else []
    for inner in dependant.dependencies:
        found += permissions(inner)
    return found


def calls(app: FastAPI) -> list[tuple[str, str, str]]:
    """Return method, path and permission of every route that is not public."""
    return [
        (method, route.path_format, permissions(route.dependant)[0])
        for route in api_routes(app)
        if isinstance(route, APIRoute) and route.path_format not in PUBLIC | SIGNED_IN
        for method in sorted(route.methods)
    ]


def concrete(path: str) -> str:
    path = re.sub(r"\{\w+_id\}", SOME_ID, path).replace("{name}", "x").replace("{model}", "x")
    assert "{" not in path
    return path


async def test_every_route_declares_one_permission_or_is_public(front: Front) -> None:
    seen = set()
    for route in api_routes(front.app):
        seen.add(route.path_format)
        declared = permissions(route.dependant) if isinstance(route, APIRoute) else []
        if route.path_format in PUBLIC | SIGNED_IN:
            assert declared == [], route.path_format
            asked = [
                inner.call
                for inner in getattr(getattr(route, "dependant", None), "dependencies", [])
                if isinstance(inner.call, SignedIn)
            ]
            assert len(asked) == (route.path_format in SIGNED_IN), route.path_format
        else:
            assert len(declared) == 1, f"{route.path_format} declares {declared}"
    assert seen >= PUBLIC | SIGNED_IN
    assert seen >= set(front.app.openapi()["paths"])


async def test_declared_permissions_are_those_that_exist(front: Front) -> None:
    assert {permission for _, _, permission in calls(front.app)} <= ALL


async def test_every_route_refuses_a_caller_without_a_token(front: Front) -> None:
    nobody = await front.client(token="")
    for method, path, _ in calls(front.app):
        response = await nobody.request(method, concrete(path), content=b"{not json")
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == 'Bearer realm="millpond"'
        assert response.json()["code"] == "token_missing"


async def test_every_route_refuses_a_caller_without_its_permission(front: Front) -> None:
    for method, path, permission in calls(front.app):
        caller = await front.client(permissions=ALL - {permission})
        response = await caller.request(method, concrete(path), content=b"{not json")
        assert response.status_code == 403, path
        problem = response.json()
        assert problem["error"]["param"] == permission
        assert permission in problem["detail"]


async def test_public_routes_need_no_token(front: Front) -> None:
    nobody = await front.client(token="")
    for path in PUBLIC:
        if path.startswith("/v1/auth/"):
            refused = await nobody.post(path, content=b"{not json")
            assert (refused.status_code, refused.json()["code"]) == (400, "malformed_body"), path
        else:
            assert (await nobody.get(path)).status_code == 200, path


@pytest.mark.parametrize("token", ["x", "a.b.c", "..", "e30.e30.e30"])
async def test_garbled_token(front: Front, token: str) -> None:
    caller = await front.client(token=token)
    response = await caller.get("/v1/runs")
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["www-authenticate"]
    assert response.json()["error"]["type"] == "authentication_error"


async def test_token_in_another_scheme_or_in_the_address_is_none(front: Front) -> None:
    nobody = await front.client(token="")
    token = front.token()
    basic = await nobody.get("/v1/runs", headers={"Authorization": f"Basic {token}"})
    assert basic.status_code == 401
    query = await nobody.get("/v1/runs", params={"access_token": token, "token": token})
    assert query.status_code == 401


async def test_expired_token_says_so(front: Front) -> None:
    caller = await front.client(ttl_s=-60)
    response = await caller.get("/v1/runs")
    assert response.status_code == 401
    assert response.json()["code"] == "token_expired"
    assert "expired at" in response.json()["detail"]


async def test_token_of_another_key(front: Front) -> None:
    genuine = front.token()
    claims = jwt.decode(genuine, options={"verify_signature": False})
    kid = jwt.get_unverified_header(genuine)["kid"]
    stranger = Ed25519PrivateKey.generate()
    for named in ({"kid": kid}, {"kid": "other"}, {}):
        header = {"typ": "at+jwt", **named}
        token = jwt.encode(claims, stranger, algorithm="EdDSA", headers=header)
        response = await (await front.client(token=token)).get("/v1/runs")
        assert response.status_code == 401


async def test_algorithm_none_is_refused(front: Front) -> None:
    genuine = front.token()
    header = {**jwt.get_unverified_header(genuine), "alg": "none"}
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    caller = await front.client(token=f"{head}.{genuine.split('.')[1]}.")
    response = await caller.get("/v1/runs")
    assert response.status_code == 401
    assert response.json()["code"] == "token_algorithm"


async def test_key_made_by_another_process_is_learned(front: Front) -> None:
    from millpond.identity.ring import KeyRing
    from millpond.identity.seal import KEY_BYTES, Seal
    from millpond.identity.tokens import Keyring

    async with front.db.globals() as con:
        await con.execute("update signing_key set retired_at = clock_timestamp()")
    other = await Keyring.open(front.db, KeyRing(Seal(bytes(KEY_BYTES))))
    front.keyring._refreshed_at = time.monotonic() - 60
    claims = jwt.decode(front.token(), options={"verify_signature": False})
    token = jwt.encode(
        claims,
        other._signer.private,
        algorithm="EdDSA",
        headers={"kid": other._signer.kid, "typ": "at+jwt"},
    )
    assert (await (await front.client(token=token)).get("/v1/runs")).status_code == 200


async def test_another_orgs_things_do_not_exist(front: Front, ann: Client, other_org: int) -> None:
    await front.publish()
    run = (await ann.post("/v1/runs", json={"flow": "echo"})).json()
    stranger = await front.client(org_id=other_org, roles=("owner",))
    path = f"/v1/runs/{run['id']}"
    for method, address in (
        ("GET", path),
        ("GET", f"{path}/events"),
        ("POST", f"{path}/cancel"),
        ("GET", f"/v1/input-requests/{run['id']}"),
    ):
        response = await stranger.request(method, address)
        assert response.status_code == 404, address
    streamed = await stranger.get(f"{path}/events", headers={"Accept": "text/event-stream"})
    assert streamed.status_code == 404
    assert (await stranger.get("/v1/runs")).json()["data"] == []
    assert (await stranger.get("/v1/queues")).json()["data"] == []
    assert (await ann.get(path)).json()["state"] == "queued"


async def test_org_of_the_token_counts_whatever_the_request_says(
    front: Front, ann: Client, other_org: int
) -> None:
    await front.publish()
    stranger = await front.client(org_id=other_org)
    await stranger.post("/v1/runs", json={"flow": "echo"})
    response = await ann.get("/v1/runs", params={"org_id": other_org})
    assert response.json()["data"] == []
    for elsewhere in (other_org, 999_999, "nowhere"):
        refused = await ann.get("/v1/runs", headers={"X-Organization-Id": str(elsewhere)})
        assert (refused.status_code, refused.json()["code"]) == (403, "org_forbidden")


async def test_unknown_path_and_method_are_problems(front: Front, ann: Client) -> None:
    missing = await ann.get("/v1/nothing")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"
    assert missing.json()["error"]["type"] == "not_found_error"
    wrong = await ann.delete("/v1/runs")
    assert wrong.status_code == 405
    assert "GET" in wrong.headers["allow"] or "POST" in wrong.headers["allow"]
    assert wrong.json()["code"] == "method_not_allowed"


async def test_malformed_id_names_the_field(front: Front, ann: Client) -> None:
    response = await ann.get("/v1/runs/not-an-id")
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "run_id"


async def test_every_response_has_a_request_id(front: Front, ann: Client) -> None:
    good = await ann.get("/v1/runs")
    bad = await ann.get("/v1/runs/not-an-id")
    assert good.headers["x-request-id"] != bad.headers["x-request-id"]
    assert bad.json()["request_id"] == bad.headers["x-request-id"]


async def test_unexpected_error_shows_nothing_of_itself(
    front: Front, ann: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("millpond.engine.queues.list_queues", explode)
    response = await ann.get("/v1/queues")
    assert response.status_code == 500
    assert "hunter2" not in response.text
    assert response.json()["code"] == "internal"
    assert response.json()["request_id"] == response.headers["x-request-id"]
