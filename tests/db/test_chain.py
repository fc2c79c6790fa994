"""Transactions one after another: one that follows at once begins with the commit of the one before."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from millpond.db.embedded import Urls
from millpond.db.pool import EngineDatabase
from millpond.db.transaction import Chain
from millpond.errors import Conflict, Permanent, Transient

SETTINGS = "select current_setting('synchronous_commit'), current_setting('millpond.duty'), pg_backend_pid()"
ADD = "insert into fair_clock (queue, virtual_s) values ($1, 1)"
SEEN = "select count(*) from fair_clock where queue = $1"
STATE = "select state from pg_stat_activity where pid = $1"


def chain(engine: EngineDatabase, *, idle_s: float = 5.0) -> Chain:
    return engine.chain("claim", durable=False, limit_s=3.0, idle_s=idle_s)


async def test_what_is_followed_is_committed_and_the_next_block_is_as_the_first(
    engine_db: EngineDatabase,
) -> None:
    claims = chain(engine_db)
    seen = []
    for nth in range(3):
        async with claims as con:
            seen.append(tuple(await con.fetchrow(SETTINGS)))
            await con.execute(ADD, f"q{nth}")
            claims.follow()
        async with engine_db.duty("test") as other:
            assert await other.fetchval(SEEN, f"q{nth}") == 1
    assert seen[0][:2] == ("off", "claim")
    assert len(set(seen)) == 1, "the same settings on the same connection"
    await claims.close()


async def test_between_blocks_it_holds_no_lock_and_no_snapshot(
    engine_db: EngineDatabase, admin_url: str
) -> None:
    claims = chain(engine_db)
    async with claims as con:
        await con.execute("select pg_advisory_xact_lock(7)")
        pid = await con.fetchval("select pg_backend_pid()")
        await con.execute(ADD, "q")
        claims.follow()
    admin = await asyncpg.connect(admin_url)
    assert await admin.fetchval(STATE, pid) == "idle in transaction"
    held = "select count(*) from pg_locks where pid = $1 and locktype <> 'virtualxid'"
    assert await admin.fetchval(held, pid) == 0
    horizon = (
        "select backend_xmin is null and backend_xid is null from pg_stat_activity where pid = $1"
    )
    assert await admin.fetchval(horizon, pid) is True
    await claims.close()
    assert await admin.fetchval(STATE, pid) == "idle"
    await admin.close()


async def test_closed_it_gives_its_connection_back(urls: Urls) -> None:
    engine = await EngineDatabase.connect(urls.engine, min_size=1, max_size=1)
    claims = chain(engine)
    async with claims:
        claims.follow()
    await claims.close()
    await claims.close()
    async with asyncio.timeout(5), engine.duty("test") as con:
        assert await con.fetchval("select 1") == 1
    async with claims as con:
        assert await con.fetchval("select 2") == 2
    await engine.close()


async def test_an_error_that_was_swallowed_never_looks_like_a_commit(
    engine_db: EngineDatabase,
) -> None:
    claims = chain(engine_db)
    with pytest.raises(Permanent, match="InFailedSQLTransaction"):
        async with claims as con:
            await con.execute(ADD, "twice")
            with pytest.raises(asyncpg.UniqueViolationError):
                await con.execute(ADD, "twice")
            claims.follow()
    async with claims as con:
        assert await con.fetchval(SEEN, "twice") == 0


async def test_a_block_that_fails_is_rolled_back_and_not_followed(urls: Urls) -> None:
    heard: list[str] = []

    async def probe(point: str) -> None:
        heard.append(point)

    engine = await EngineDatabase.connect(urls.engine, min_size=1, max_size=1, probe=probe)
    claims = chain(engine)
    async with claims:
        claims.follow()
    with pytest.raises(Conflict):
        async with claims as con:
            await con.execute(ADD, "lost")
            claims.follow()
            raise Conflict("the block fails")
    async with claims as con:
        assert await con.fetchval(SEEN, "lost") == 0
    assert heard == ["before:claim", "after:claim"] * 2
    await engine.close()


async def test_a_connection_that_was_ended_between_blocks_is_replaced(
    engine_db: EngineDatabase,
) -> None:
    """The server ends a session that is idle for too long, as where the process was stopped."""
    claims = chain(engine_db, idle_s=0.1)
    async with claims:
        claims.follow()
    await asyncio.sleep(0.5)
    async with claims as con:
        assert await con.fetchval("select 1") == 1
    with pytest.raises(Transient):
        async with claims as con:
            await asyncio.sleep(0.5)
            await con.fetchval("select 1")
