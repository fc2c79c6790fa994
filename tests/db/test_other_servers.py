"""Servers other than the embedded one: the distribution's, and Postgres 16 with pgvector from a wheel.

The distribution's (15 on Debian 12) comes without pgvector, so it carries the engine alone.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import pytest
from tests.engine.conftest import Pond

from millpond.db.embedded import Urls
from millpond.db.migrate import check_schema, migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.engine.context import Context
from millpond.engine.events import Feed
from millpond.engine.hints import Hints
from millpond.errors import MillpondError

DEBIAN = Path("/usr/lib/postgresql")
# The only migration that needs extensions.
KNOWLEDGE = "0002_knowledge.sql"


def _wheel_16() -> Path | None:
    spec = find_spec("pgserver")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _oldest_of_debian() -> Path | None:
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[0].parent if found else None


def _require(binaries: Path | None, what: str) -> Path:
    if binaries is not None and (binaries / "initdb").exists():
        return binaries
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, which CI installs")
    pytest.skip(f"{what} is not installed: scripts/system-packages, scripts/setup dev")


@dataclass
class Server:
    """A server by hand: superuser on a socket, ours to stop."""

    folder: Path
    password: str
    port: int = 5432

    def url(self, role: str, database: str = "millpond") -> str:
        """Return the address of a role."""
        return (
            f"postgresql://{role}:{self.password}@/{database}?host={self.folder}&port={self.port}"
        )

    @property
    def urls(self) -> Urls:
        """Return the addresses that an operator would configure."""
        return Urls(
            owner=self.url("boss"),
            app=self.url("millpond_app"),
            engine=self.url("millpond_engine"),
        )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's user owns, with a short path for its socket."""
    path = Path(tempfile.mkdtemp(prefix="mp-other-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def _server(
    binaries: Path,
    folder: Path,
    *,
    options: Sequence[str] = ("listen_addresses=",),
    rules: str | None = None,
    port: int = 5432,
) -> AsyncIterator[Server]:
    server = Server(folder, secrets.token_hex(16), port)
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
        if not binaries.is_relative_to("/usr"):
            # The server refuses to be root, and its own user cannot read root's folders.
            package = binaries.parent.parent
            for part in (package, package.with_name("pgserver.libs")):
                shutil.copytree(part, folder / "wheel" / part.name, symlinks=True)
            binaries = folder / "wheel" / package.name / "pginstall" / "bin"
    (folder / "password").write_text(server.password)
    if user:
        for path in (folder / "password", *folder.glob("*.pem")):
            shutil.chown(path, user)
            path.chmod(0o600)
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(
        [binaries / "initdb", "-D", folder / "data", "-U", "boss", "--auth=scram-sha-256",
         "--encoding=UTF8", f"--pwfile={folder / 'password'}", "--no-sync"],
        check=True, capture_output=True, user=user, env=environment, cwd=folder,
    )  # fmt: skip
    if rules is not None:
        (folder / "data" / "pg_hba.conf").write_text(rules)
    settings = [word for option in options for word in ("-c", option)]
    process = await asyncio.create_subprocess_exec(
        binaries / "postgres", "-D", folder / "data", "-k", folder, *settings, "-c", "fsync=off",
        stderr=subprocess.DEVNULL, user=user, env=environment, cwd=folder,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    con = await asyncpg.connect(server.url("boss", "postgres"))
                    break
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.1)
        await con.execute("create database millpond")
        await con.close()
        yield server
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def _takes_a_run_down_the_road(urls: Urls) -> None:
    db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
    hints, feed = await Hints.connect(urls.engine), await Feed.connect(urls.engine)
    async with db.globals() as con:
        org_id = await con.fetchval(
            "insert into org (slug, name) values ('o', 'o') returning org_id"
        )
    pond = Pond(urls, db, engine_db, org_id, hints, feed)

    async def road(ctx: Context, n: int) -> int:
        async def double(value: int) -> int:
            return 2 * value

        await ctx.sleep(1.1)
        left, right = await ctx.parallel(ctx.step("d", double, n), ctx.step("d", double, n + 1))
        return int(left + right)

    pond.flow(road)
    try:
        async with pond.worker():
            ids = [await pond.submit("road", n) for n in range(10)]
            outputs = [(await pond.ended(run_id))["output"] for run_id in ids]
    finally:
        await feed.close()
        await hints.close()
        await engine_db.close()
        await db.close()
    assert outputs == [4 * n + 2 for n in range(10)]


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the wheel of Postgres 16 ends at Python 3.12"
)
async def test_postgres_16_carries_everything(folder: Path) -> None:
    async with _server(_require(_wheel_16(), "the wheel pgserver"), folder) as server:
        urls = server.urls
        applied = await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
        assert applied
        assert await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine) == []
        await check_schema(urls.app)
        await _takes_a_run_down_the_road(urls)


async def test_the_distributions_server_carries_the_engine_and_migrate_names_what_it_lacks(
    folder: Path,
) -> None:
    async with _server(_require(_oldest_of_debian(), "Debian's postgresql"), folder) as server:
        urls = server.urls
        with pytest.raises(MillpondError, match="vector"):
            await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
        con = await asyncpg.connect(urls.owner)
        has_engine = await con.fetchval("select to_regclass('millpond.run') is not null")
        await con.execute("set search_path = millpond, public")
        # What needs no extension: all but the knowledge base.
        migrations = files("millpond.db").joinpath("migrations")
        for path in sorted(migrations.iterdir(), key=lambda one: one.name):
            is_there = has_engine and path.name.startswith("0001_")
            if path.name.endswith(".sql") and path.name != KNOWLEDGE and not is_there:
                await con.execute(path.read_text())
        await con.close()
        await _takes_a_run_down_the_road(urls)
