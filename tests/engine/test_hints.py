"""Hints: what sending one leaves behind, which is nothing."""

from __future__ import annotations

import asyncio

import asyncpg
from tests.engine.conftest import DEADLINE_S

from millpond.db.embedded import Urls
from millpond.engine.hints import WAKE, connect, send


async def test_a_hint_arrives_and_leaves_the_next_one_on_its_connection_durable(urls: Urls) -> None:
    """Behind a transaction pooler that is anybody: what is set for a session holds for them too."""
    heard: asyncio.Queue[object] = asyncio.Queue()
    listener = await asyncpg.connect(urls.engine)
    await listener.add_listener(
        WAKE, lambda _con, _pid, _channel, payload: heard.put_nowait(payload)
    )
    for url in (urls.app, urls.engine):
        con = await connect(url)
        for payload in ("sql", "llm"):
            await send(con, [(WAKE, payload)])
            assert await con.fetchval("show synchronous_commit") == "on"
        await con.close()
    async with asyncio.timeout(DEADLINE_S):
        assert [await heard.get() for _ in range(4)] == ["sql", "llm"] * 2
    await listener.close()
