"""Behind a transaction pooler: what `doctor` finds, what hints leave behind, and runs where statements are carried.

Debian 12 has PgBouncer 1.18, which loses prepared statements; from 1.21 on the road itself is tested too.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
from tests.engine.conftest import Pond

from millpond.cli.checks import check_pooler
from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.db.pooler import pooler_before
from millpond.engine.context import Context
from millpond.engine.events import Feed
from millpond.engine.hints import WAKE, Hints, connect, send

PORT = 6432
CARRIES = (1, 21)


def _binary() -> str:
    built = str(Path(__file__).resolve().parents[2] / "build" / "pooler")
    path = os.pathsep.join((built, os.environ.get("PATH", ""), "/usr/sbin"))
    found = shutil.which("pgbouncer", path=path)
    if found is None and os.environ.get("CI"):
        pytest.fail("pgbouncer is missing, which CI installs")
    if found is None:
        pytest.skip("pgbouncer is not installed: CI=1 scripts/system-packages")
    return found


def _version() -> tuple[int, ...]:
    told = subprocess.run([_binary(), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"PgBouncer (\d+)\.(\d+)", told.stdout)
    assert found is not None
    return tuple(map(int, found.groups()))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that the pooler's user owns, with a short path for its socket."""
    path = Path(tempfile.mkdtemp(prefix="mp-pool-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def _pooled(urls: Urls, place: Path, *, size: int = 4) -> AsyncIterator[Urls]:
    """Run PgBouncer in transaction mode before the test's database; yields the addresses through it."""
    direct = urlsplit(urls.app)
    database, socket = direct.path.lstrip("/"), parse_qs(direct.query)["host"][0]
    people = [urlsplit(url) for url in (urls.app, urls.engine)]
    lines = [f'"{one.username}" "{one.password}"\n' for one in people]
    (place / "users").write_text("".join(lines))
    more = "max_prepared_statements = 100\n" if _version() >= CARRIES else ""
    (place / "ini").write_text(
        f"[databases]\n{database} = host={socket} dbname={database}\n[pgbouncer]\n"
        f"listen_addr =\nlisten_port = {PORT}\nunix_socket_dir = {place}\nauth_type = scram-sha-256\n"
        f"auth_file = {place / 'users'}\npool_mode = transaction\ndefault_pool_size = {size}\n"
        f"logfile = {place / 'log'}\nignore_startup_parameters = extra_float_digits\n{more}"
    )
    # The server's socket stands in a folder that only its own user may enter.
    user = os.stat(socket).st_uid if os.geteuid() == 0 else None
    if user is not None:
        for path in (place, *place.iterdir()):
            os.chown(path, user, -1)
    process = await asyncio.create_subprocess_exec(
        _binary(), str(place / "ini"), stderr=subprocess.DEVNULL, user=user, cwd=place
    )
    pooled = Urls(
        owner=urls.owner,
        **{
            role: f"postgresql://{one.username}:{one.password}@/{database}?host={place}&port={PORT}"
            for role, one in zip(("app", "engine"), people, strict=True)
        },
    )
    try:
        async with asyncio.timeout(20):
            while not (place / f".s.PGSQL.{PORT}").exists():
                await asyncio.sleep(0.05)
        yield pooled
    finally:
        process.terminate()
        await process.wait()
        print((place / "log").read_text()[-2000:])


async def test_doctor_tells_whether_the_pooler_knows_prepared_statements_again(
    urls: Urls, place: Path
) -> None:
    assert await pooler_before(urls.app) == "none"
    assert await check_pooler("app", urls.app, None) == []
    async with _pooled(urls, place) as pooled:
        found = await pooler_before(pooled.app)
        [check] = await check_pooler("engine", pooled.engine, None)
        checks = await check_pooler("engine", pooled.engine, urls.engine)
    if _version() >= CARRIES:
        assert (found, check.state, checks[0].state) == ("carries", "warning", "ok")
        assert "MILLPOND_LISTEN_DATABASE_URL" in check.advice
    else:
        assert (found, check.state, checks[0].state) == ("loses", "failed", "failed")
        assert "1.21" in check.advice


async def test_a_pooler_without_a_second_connection_leaves_the_question_open(
    urls: Urls, place: Path
) -> None:
    async with _pooled(urls, place, size=1) as pooled:
        [check] = await check_pooler("app", pooled.app, None)
    assert check.state == "warning"


async def test_hints_leave_the_commits_of_others_durable(urls: Urls, place: Path) -> None:
    """One server connection, so that whoever comes next has that of the hints."""
    async with _pooled(urls, place, size=1) as pooled:
        con = await connect(pooled.app)
        await send(con, [(WAKE, "default")])
        await con.close()
        other = await asyncpg.connect(pooled.app, statement_cache_size=0)
        async with other.transaction():
            assert await other.fetchval("show synchronous_commit") == "on"
        await other.close()


async def test_runs_go_their_way_behind_a_pooler_that_carries_statements(
    urls: Urls, place: Path, org: int
) -> None:
    if _version() < CARRIES:
        pytest.skip(f"PgBouncer {_version()} loses prepared statements")

    async def road(ctx: Context, n: int) -> int:
        async def double(value: int) -> int:
            return 2 * value

        await ctx.sleep(1.1)
        return await ctx.step("double", double, n)

    async with _pooled(urls, place) as pooled:
        db, engine_db = (
            await Database.connect(pooled.app),
            await EngineDatabase.connect(pooled.engine),
        )
        hints, feed = await Hints.connect(pooled.engine), await Feed.connect(urls.engine)
        pond = Pond(pooled, db, engine_db, org, hints, feed)
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
