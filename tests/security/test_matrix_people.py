"""Routes that need no permission × nobody, an ended session, whoever is signed in: what is somebody else's is unknown.

The lists of such routes are those of `api.auth`; one without an entry in `people_things` fails.
"""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import structlog
from tests.api.conftest import Client
from tests.security.conftest import World
from tests.security.people_things import (
    PUBLIC_ENTRIES,
    SIGNED_IN_ENTRIES,
    Ask,
    Street,
    street,
)
from tests.security.test_matrix import DOCUMENT, PLACES, told

from millpond.api.auth import PUBLIC, SIGNED_IN

# Served without standing in the document: the document itself.
BESIDE = {("GET", "/openapi.json")}


def routes(paths: frozenset[str]) -> set[tuple[str, str]]:
    described = {
        (method.upper(), path)
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
        if path in paths
    }
    return described | {(method, path) for method, path in BESIDE if path in paths}


def test_every_route_without_a_permission_has_an_entry_and_no_other() -> None:
    assert set(PUBLIC_ENTRIES) == routes(PUBLIC)
    assert set(SIGNED_IN_ENTRIES) == routes(SIGNED_IN)
    assert {path for _, path in PUBLIC_ENTRIES} == PUBLIC
    assert {path for _, path in SIGNED_IN_ENTRIES} == SIGNED_IN


@pytest.fixture
async def at(world: World) -> Street:
    return await street(world)


async def asked(client: Client, method: str, path: str, ask: Ask) -> httpx2.Response:
    filled = PLACES.sub(lambda found: ask.path[found[1]], path)
    return await client.request(method, filled, json=ask.json, headers=ask.headers)


def words(ask: Ask) -> list[str]:
    """What a request names: an answer may repeat it."""
    texts = [*ask.path.values(), *ask.headers.values(), *map(str, (ask.json or {}).values())]
    return [text for text in texts if len(text) > 3]  # a short one stands in any answer


async def rows_of(at: Street) -> list[Any]:
    """All that is stored of the other person and their sessions, but what is used by mailing them."""
    account = await at.world.owner.fetchrow(
        "select email, name, password_hash, is_operator, version, disabled_at from account where user_id = $1",
        at.other.user_id,
    )
    sessions = await at.world.owner.fetch(
        "select session_id, revoked_at from login_session where user_id = $1 order by session_id",
        at.other.user_id,
    )
    seats = await at.world.owner.fetch(
        "select org_id, role, version from membership where user_id = $1", at.other.user_id
    )
    return [dict(account), [dict(row) for row in sessions], [dict(row) for row in seats]]


def check_shows_nothing(answer: httpx2.Response, secrets: list[str], named: list[str]) -> None:
    text = answer.text
    for word in named:
        text = text.replace(word, "")
    assert [secret for secret in secrets if secret in text] == []


async def check_others_is_unknown(
    at: Street, client: Client, method: str, path: str, others: Ask, unknown: Ask
) -> None:
    """What is somebody else's gets the answer of what is unknown, and stays as it is."""
    before, secrets = await rows_of(at), await at.others_secrets()
    one = await asked(client, method, path, others)
    two = await asked(client, method, path, unknown)
    assert told(one, *words(others)) == told(two, *words(unknown))
    check_shows_nothing(one, secrets, words(others))
    assert await rows_of(at) == before
    assert (await at.others_client.get("/v1/me")).status_code == 200


PUBLIC_ROUTES = sorted(PUBLIC_ENTRIES)
SIGNED_IN_ROUTES = sorted(SIGNED_IN_ENTRIES)


@pytest.mark.parametrize(
    ("method", "path"), PUBLIC_ROUTES, ids=[f"{m} {p}" for m, p in PUBLIC_ROUTES]
)
async def test_a_public_route_answers_nobody_and_shows_nobody(
    at: Street, method: str, path: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        entry = await PUBLIC_ENTRIES[method, path](at)
        if entry.others is not None and entry.unknown is not None:
            for client in (at.nobody, at.client):  # a token makes no difference
                await check_others_is_unknown(at, client, method, path, entry.others, entry.unknown)
        before, secrets = await rows_of(at), await at.others_secrets()
        good = await asked(at.nobody, method, path, entry.good)
        assert good.status_code == entry.status, good.text
        assert [text for text in entry.shows if text not in good.text] == []
        check_shows_nothing(good, secrets, [])
        assert await rows_of(at) == before
        if method == "GET":
            bad = await at.world.front.client(token="no.good.token")
            assert (await asked(bad, method, path, entry.good)).status_code == entry.status
    assert [log for log in logs if log["event"] in {"request.failed", "request.crashed"}] == []


@pytest.mark.parametrize(
    ("method", "path"), SIGNED_IN_ROUTES, ids=[f"{m} {p}" for m, p in SIGNED_IN_ROUTES]
)
async def test_a_route_about_oneself_answers_who_is_signed_in_about_themselves(
    at: Street, method: str, path: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        entry = await SIGNED_IN_ENTRIES[method, path](at)
        missing = await asked(at.nobody, method, path, entry.good)
        assert (missing.status_code, missing.json()["code"]) == (401, "token_missing")
        await _asked_by_who_was_signed_out(at, method, path, entry.good)
        assert entry.others is not None
        assert entry.unknown is not None
        await check_others_is_unknown(at, at.client, method, path, entry.others, entry.unknown)
        before, secrets = await rows_of(at), await at.others_secrets()
        good = await asked(at.client, method, path, entry.good)
        assert good.status_code == entry.status, good.text
        assert [text for text in entry.shows if text not in good.text] == []
        check_shows_nothing(good, secrets, [])
        assert await rows_of(at) == before
    assert [log for log in logs if log["event"] in {"request.failed", "request.crashed"}] == []


async def _asked_by_who_was_signed_out(at: Street, method: str, path: str, ask: Ask) -> None:
    """Ask with a token that is good by itself, of another session of the same person, which was ended."""
    gone = await at.world.person()
    session_id = gone.session_id
    await at.world.owner.execute(
        "update login_session set user_id = $1, revoked_at = now(), revoked_why = 'test' where session_id = $2",
        at.me.user_id,
        session_id,
    )
    mine = at.me.passport()
    passport = type(mine)(
        subject=mine.subject, session_id=session_id, stamp=mine.stamp, seats=mine.seats
    )
    token = at.world.front.keyring.mint_access(passport, 600)
    stale = await asked(await at.world.front.client(token=token), method, path, ask)
    assert (stale.status_code, stale.json()["code"]) == (401, "token_stale")


async def test_a_key_is_no_person(at: Street) -> None:
    """Programs have no sessions, passwords or invitations; they may ask who they are."""
    boss = await at.world.owner_of(at.world.org_id)
    made = await boss.post("/v1/api-keys", json={"name": "k", "scopes": ["runs:read"]})
    key = await at.world.front.client(token=made.json()["key"])
    for method, path in SIGNED_IN_ROUTES:
        entry = (
            await SIGNED_IN_ENTRIES[method, path](at)
            if path != "/v1/auth/invitations/accept"
            else None
        )
        ask = entry.good if entry is not None else Ask(json={"token": "mpi_1_x"})
        answer = await asked(key, method, path, ask)
        if (method, path) == ("GET", "/v1/me"):
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "session_needed")
