"""Keys read together: many requests share a look, and none is answered by a look that began before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.security.conftest import World

from millpond.db.pool import Connection, Database
from millpond.errors import Transient, Unauthenticated, Unavailable
from millpond.identity.gate import Wish
from millpond.identity.key_reader import KeyReader


class Slow:
    """A pool whose transactions end only when they may, counted."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.may_end = asyncio.Event()
        self.has_read = asyncio.Event()
        self.begun = 0
        self.error: Exception | None = None

    @asynccontextmanager
    async def org(self, org_id: int) -> AsyncIterator[Connection]:
        self.begun += 1
        if self.error is not None:
            raise self.error
        async with self.db.org(org_id) as con:
            yield con
        self.has_read.set()
        await self.may_end.wait()


@pytest.fixture
async def slow(world: World) -> Slow:
    return Slow(world.front.db)


@pytest.fixture
async def reader(slow: Slow) -> AsyncIterator[KeyReader]:
    made = KeyReader(slow)  # type: ignore[arg-type]
    yield made
    slow.may_end.set()
    await made.close()


async def new_key(world: World) -> dict[str, Any]:
    boss = await world.owner_of(world.org_id)
    wish = {"name": "k", "scopes": ["runs:read"]}
    made: dict[str, Any] = (await boss.post("/v1/api-keys", json=wish)).json()
    # As it would be after its first use, which is remembered by another transaction.
    await world.owner.execute("update api_key set used_at = now()")
    return made


async def test_a_key_revoked_during_a_look_is_refused_to_whoever_asks_after(
    world: World, slow: Slow, reader: KeyReader
) -> None:
    key = await new_key(world)
    early = asyncio.create_task(reader.admit(key["key"], Wish()))
    await slow.has_read.wait()
    await world.owner.execute("update api_key set revoked_at = now()")
    late = asyncio.create_task(reader.admit(key["key"], Wish()))
    await asyncio.sleep(0)
    slow.may_end.set()
    assert (await early).subject == f"key:{key['id']}"
    with pytest.raises(Unauthenticated):
        await late


async def test_many_who_ask_during_a_look_share_the_next_and_each_gets_their_own(
    world: World, slow: Slow, reader: KeyReader
) -> None:
    keys = [await new_key(world) for _ in range(2)]
    asked = [asyncio.create_task(reader.admit(keys[0]["key"], Wish()))]
    await slow.has_read.wait()
    asked += [asyncio.create_task(reader.admit(keys[n % 2]["key"], Wish())) for n in range(1, 20)]
    wrong = asyncio.create_task(reader.admit(keys[0]["key"][:-64] + "0" * 64, Wish()))
    await asyncio.sleep(0)
    slow.may_end.set()
    found = [principal.subject for principal in await asyncio.gather(*asked)]
    assert found == [f"key:{keys[n % 2]['id']}" for n in range(20)]
    with pytest.raises(Unauthenticated):
        await wrong
    assert slow.begun == 2


async def test_who_gives_up_waiting_takes_nobody_along(
    world: World, slow: Slow, reader: KeyReader
) -> None:
    key = await new_key(world)
    asked = [asyncio.create_task(reader.admit(key["key"], Wish())) for _ in range(3)]
    await slow.has_read.wait()
    asked[0].cancel()
    slow.may_end.set()
    assert {(await one).subject for one in asked[1:]} == {f"key:{key['id']}"}


async def test_a_look_that_fails_fails_those_who_asked_and_the_next_is_made_anew(
    world: World, slow: Slow, reader: KeyReader
) -> None:
    key = await new_key(world)
    slow.may_end.set()
    slow.error = Unavailable("away", retry_after_s=1.0)
    outcomes = await asyncio.gather(
        *(reader.admit(key["key"], Wish()) for _ in range(3)), return_exceptions=True
    )
    assert [type(one) for one in outcomes] == [Unavailable] * 3
    assert issubclass(Unavailable, Transient)
    slow.error = None
    assert (await reader.admit(key["key"], Wish())).org_id == world.org_id
