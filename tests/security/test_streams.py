"""A stream that is open ends when its caller may see no more."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.security.conftest import Person, World

from millpond.api import sse


async def last_word(world: World, person: Person, change: str, *, ttl_s: float = 600) -> Any:
    """Open the stream of a run that stands still, change something, and return how the stream ends."""
    await world.front.publish("echo")
    owner = await world.owner_of(world.org_id)
    run = (await owner.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    caller = await world.front.client(token=world.token(person, ttl_s))
    words = []
    async with asyncio.timeout(30), caller.sse(f"/v1/runs/{run}/events") as source:
        async for message in source:
            words.append(message)
            if message.event == "run.queued" and change:
                await world.owner.execute(change)
    assert [one.event for one in words] == ["run.queued", "closed"]
    return json.loads(words[-1].data)["reason"]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every 50 ms, so that a test need not wait for the period."""
    monkeypatch.setattr(
        sse.EventStream.__init__,
        "__kwdefaults__",
        {**(sse.EventStream.__init__.__kwdefaults__ or {}), "check_s": 0.05},
    )


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


def test_the_last_word_has_no_number_that_a_client_could_resume_from() -> None:
    assert not any(line.startswith(b"id") for line in sse.closed("token_stale").splitlines())


async def test_a_stream_ends_with_its_token(world: World) -> None:
    assert await last_word(world, await world.member("viewer"), "", ttl_s=1) == "token_expired"
