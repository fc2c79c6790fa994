"""Behind a transaction pooler: what `doctor` finds, what hints leave behind, and runs where statements are carried.

From 1.21 on, PgBouncer carries prepared statements, and `tests/pooled` takes much of the suite through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from tests import pooler
from tests.engine.conftest import Pond
from tests.pooler import CARRIES, need_statements_carried, pooled, version

from millpond.cli.checks import check_pooler
from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.db.pooler import pooler_before
from millpond.engine.context import Context
from millpond.engine.events import Feed
from millpond.engine.hints import WAKE, Hints, connect, send


@pytest.fixture
def place() -> Iterator[Path]:
    """The folder of a pooler."""
    with pooler.place() as path:
        yield path


async def test_doctor_tells_whether_the_pooler_knows_prepared_statements_again(
    urls: Urls, place: Path
) -> None:
    assert await pooler_before(urls.app) == "none"
    assert await check_pooler("app", urls.app, None) == []
    with pooled(urls, place) as behind:
        found = await pooler_before(behind.app)
        [check] = await check_pooler("engine", behind.engine, None)
        checks = await check_pooler("engine", behind.engine, urls.engine)
    if version() >= CARRIES:
        assert (found, check.state, checks[0].state) == ("carries", "warning", "ok")
        assert "MILLPOND_LISTEN_DATABASE_URL" in check.advice
    else:
        assert (found, check.state, checks[0].state) == ("loses", "failed", "failed")
        assert "1.21" in check.advice


async def test_a_pooler_without_a_second_connection_leaves_the_question_open(
    urls: Urls, place: Path
) -> None:
    with pooled(urls, place, size=1) as behind:
        [check] = await check_pooler("app", behind.app, None)
    assert check.state == "warning"


async def test_hints_leave_the_commits_of_others_durable(urls: Urls, place: Path) -> None:
    """One server connection, so that whoever comes next has that of the hints."""
    with pooled(urls, place, size=1) as behind:
        con = await connect(behind.app)
        await send(con, [(WAKE, "default")])
        await con.close()
        other = await asyncpg.connect(behind.app, statement_cache_size=0)
        async with other.transaction():
            assert await other.fetchval("show synchronous_commit") == "on"
        await other.close()


async def test_runs_go_their_way_behind_a_pooler_that_carries_statements(
    urls: Urls, place: Path, org: int
) -> None:
    need_statements_carried()

    async def road(ctx: Context, n: int) -> int:
        async def double(value: int) -> int:
            return 2 * value

        await ctx.sleep(1.1)
        return await ctx.step("double", double, n)

    with pooled(urls, place) as behind:
        db, engine_db = (
            await Database.connect(behind.app),
            await EngineDatabase.connect(behind.engine),
        )
        hints, feed = await Hints.connect(behind.engine), await Feed.connect(urls.engine)
        pond = Pond(behind, db, engine_db, org, hints, feed)
        pond.flow(road)
        try:
            async with pond.worker():
                ids = [await pond.submit("road", n) for n in range(20)]
                outputs = [(await pond.ended(run_id))["output"] for run_id in ids]
        finally:
            await feed.close()
            await hints.close()
            await engine_db.close()
            await db.close()
    assert outputs == [2 * n for n in range(20)]
