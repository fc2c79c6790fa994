"""A stream that is open ends when its caller may see no more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.api.conftest import Client
from tests.security.conftest import Person, World

from millpond.api import sse

Change = Callable[[], Awaitable[Any]]


async def last_word(world: World, person: Person, change: str, *, ttl_s: float = 600) -> Any:
    """Open somebody's stream of a run, change something in the database, and return how the stream ends."""
    caller = await world.front.client(token=world.token(person, ttl_s))

    async def act() -> None:
        if change:
            await world.owner.execute(change)

    return await end_of(world, caller, act)


async def end_of(world: World, caller: Client, change: Change) -> Any:
    """Open a stream of a run that stands still, do something while it is open, and return why it ended."""
    await world.front.publish("echo")
    owner = await world.owner_of(world.org_id)
    run = (await owner.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    words = []
    async with asyncio.timeout(30), caller.sse(f"/v1/runs/{run}/events") as source:
        async for message in source:
            words.append(message)
            if message.event == "run.queued":
                await change()
    assert [one.event for one in words] == ["run.queued", "closed"]
    return json.loads(words[-1].data)["reason"]


CHECKED_EVERY_S = (sse.EventStream.__init__.__kwdefaults__ or {})["check_s"]


def often(monkeypatch: pytest.MonkeyPatch, check_s: float) -> None:
    """Let streams ask so often."""
    defaults = {**(sse.EventStream.__init__.__kwdefaults__ or {}), "check_s": check_s}
    monkeypatch.setattr(sse.EventStream.__init__, "__kwdefaults__", defaults)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every 50 ms, so that a test need not wait for the period."""
    often(monkeypatch, 0.05)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("update login_session set revoked_at = now(), revoked_why = 'x'", "token_stale"),
        ("update membership set version = version + 1", "token_stale"),
        ("update org set suspended_at = now(), suspended_reason = 'x'", "org_suspended"),
    ],
)
async def test_a_stream_ends_when_rights_change(world: World, change: str, reason: str) -> None:
    assert await last_word(world, await world.member("viewer"), change) == reason


@pytest.mark.parametrize("how", ["ended by the owner", "expired", "no operator any more"])
async def test_an_operators_stream_ends_with_their_grant(world: World, how: str) -> None:
    boss = await world.owner_of(world.org_id)
    person = await world.person(is_operator=True)
    wish = {"operator_email": person.email, "reason": "look", "hours": 1}
    grant = (await boss.post("/v1/grants", json=wish)).json()["id"]
    operator = await world.client(person)
    operator.headers["X-Organization-Id"] = world.slugs[world.org_id]

    async def change() -> None:
        if how == "ended by the owner":
            assert (await boss.delete(f"/v1/grants/{grant}")).status_code < 300
        elif how == "expired":
            await world.owner.execute("update access_grant set expires_at = now()")
        else:
            await world.owner.execute("update account set is_operator = false")

    assert await end_of(world, operator, change) == "token_stale"


@pytest.mark.parametrize("how", ["revoked", "expired", "its owner left", "its owner is disabled"])
async def test_a_keys_stream_ends_with_the_key(world: World, how: str) -> None:
    person = await world.member("owner")
    boss = await world.client(person)
    made = (await boss.post("/v1/api-keys", json={"name": "k", "scopes": ["runs:read"]})).json()
    other = await world.owner_of(world.org_id)

    async def change() -> None:
        if how == "revoked":
            assert (await boss.delete(f"/v1/api-keys/{made['id']}")).status_code < 300
        elif how == "expired":
            await world.owner.execute("update api_key set expires_at = now()")
        elif how == "its owner left":
            assert (await other.delete(f"/v1/members/{person.user_id}")).status_code < 300
        else:
            await world.owner.execute(
                "update account set disabled_at = now() where user_id = $1", person.user_id
            )

    key = await world.front.client(token=made["key"])
    assert await end_of(world, key, change) == "token_stale"


def test_the_last_word_has_no_number_that_a_client_could_resume_from() -> None:
    assert not any(line.startswith(b"id") for line in sse.closed("token_stale").splitlines())


@pytest.mark.parametrize("check_s", [0.05, 3600])
async def test_a_stream_ends_with_its_token(
    world: World, monkeypatch: pytest.MonkeyPatch, check_s: float
) -> None:
    """At its end, not when it would be asked about next."""
    often(monkeypatch, check_s)
    assert await last_word(world, await world.member("viewer"), "", ttl_s=3) == "token_expired"


@pytest.mark.parametrize("change", ["", "update membership set version = version + 1"])
async def test_the_feed_of_all_runs_ends_so_too(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    often(monkeypatch, 0.05 if change else 3600)
    person = await world.member("viewer")
    caller = await world.front.client(token=world.token(person, 600 if change else 3))
    await world.front.publish("echo")
    owner = await world.owner_of(world.org_id)
    words = []
    async with asyncio.timeout(30), caller.sse("/v1/run-events") as source:
        await owner.post("/v1/runs", json={"flow": "echo"})
        async for message in source:
            words.append(message)
            if message.event == "run.queued" and change:
                await world.owner.execute(change)
    assert [one.event for one in words] == ["run.queued", "closed"]
    reason = json.loads(words[-1].data)["reason"]
    assert reason == ("token_stale" if change else "token_expired")


def test_streams_ask_every_five_seconds_unless_a_test_says_otherwise() -> None:
    assert CHECKED_EVERY_S == sse.CHECK_S == 5
