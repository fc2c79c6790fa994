"""Fixtures on real Postgres: one server per test process, a fresh database per test.

Invariant: a test's database is a copy of one migrated template and is gone after the test; nothing
here opens a folder outside of the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import httpx2
import httpx2._transports.default as transports
import psutil
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings
from tests.pooler import PORT

from millpond.db.embedded import DATABASE, EmbeddedPostgres, Urls
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import MillpondError

SERVER_FOLDER = "millpond-test-"
MEMORY_BYTES = 4 * 2**30
# Lost with the machine, which is all right for a test and nowhere else.
TEST_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "max_wal_size": "256MB",
    "min_wal_size": "80MB",
    # Roles' passwords are random; a test opens a dozen connections, and 2 ms of each went into hashing one.
    "scram_iterations": "1",
}


# Each client makes one, and each guarded transport another, which takes 50 ms; none of them is changed afterwards.
httpx2.create_ssl_context = functools.cache(httpx2.create_ssl_context)
transports.create_ssl_context = httpx2.create_ssl_context  # type: ignore[attr-defined]


# Types with smaller numbers are Postgres' own, the same in every database.
OWN_TYPES = 16384
_ask_for_types = asyncpg.Connection._introspect_types
_types: dict[frozenset[int], Any] = {}


async def _know_types(con: Any, numbers: Iterable[int], timeout: float | None) -> Any:
    """Answer the driver's question for array types, which takes a server 13 ms, once for all connections.

    Behind the pooler, where the question is what may go wrong, it is asked each time.
    """
    asked = frozenset(numbers)
    if max(asked) >= OWN_TYPES or str(con._addr).endswith(f".{PORT}"):
        return await _ask_for_types(con, asked, timeout)
    if asked not in _types:
        _types[asked], _ = await _ask_for_types(con, asked, timeout)
    return _types[asked], SimpleNamespace(name="none was made")


asyncpg.Connection._introspect_types = _know_types


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites golden files from what is there now."""
    parser.addoption("--renew-golden", action="store_true", help="rewrite tests/golden/*")


# What takes longest, the longest first: a whole group of tests that one process takes, or single ones of 15 s and more.
LONGEST = (
    "test_fuzz",
    "@platform",
    "tests/hosts/",
    "test_a_suite_of_our_own",
    "test_flood",
    "test_storm",
    "test_pond_machine",
    "test_an_api_without_limits",
    "test_sealing_measures",
    "test_restarts",
    "_processes.py",
    "test_quarantine",
)


def pytest_configure() -> None:
    """Let no property fail because the machine was slow at one example."""
    patient = settings(
        settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("patient", patient)
    settings.load_profile("patient")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: at the end it would keep one process busy and the others idle."""

    def turn(item: pytest.Item) -> int:
        groups = [f"@{name}" for mark in item.iter_markers("xdist_group") for name in mark.args]
        named = "".join([item.nodeid, *groups])
        return next((nth for nth, one in enumerate(LONGEST) if one in named), len(LONGEST))

    items.sort(key=turn)


def _scratch() -> Path:
    """Return where test servers live: in memory where there is room, where a copy takes 20 ms.

    A container's own shared memory is small and lets nothing be executed.
    """
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        found = os.statvfs(memory)
        if found.f_bavail * found.f_frsize > MEMORY_BYTES and not found.f_flag & os.ST_NOEXEC:
            return memory
    return Path(tempfile.gettempdir())


async def _stop_left_over() -> None:
    """Stop servers of test processes that were killed, and remove their folders."""
    for folder in _scratch().glob(f"{SERVER_FOLDER}*-*"):
        pid = folder.name.removeprefix(SERVER_FOLDER).split("-")[0]
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(MillpondError, OSError):
            for lock in folder.glob("**/postgres/lock"):
                await EmbeddedPostgres(lock.parent.parent).stop_left_over()
            shutil.rmtree(folder, ignore_errors=True)


def open_folder() -> Path:
    """Make a folder that the server's system user can reach when the tests run as root.

    Pytest's own folders are closed to it.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{SERVER_FOLDER}{os.getpid()}-", dir=_scratch()))
    folder.chmod(0o711)
    return folder


@pytest.fixture(scope="module")
def folder_of_module() -> Iterator[Path]:
    """A folder for what the tests of one file share."""
    folder = open_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data directory for a test that runs a server of its own, which it stops itself."""
    folder = open_folder()
    yield folder / "data"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedPostgres]:
    """The Postgres of this test process; its database `millpond` is the migrated template."""
    asyncio.run(_stop_left_over())
    folder = open_folder()
    server = EmbeddedPostgres(folder, owner_note="tests", options=TEST_OPTIONS)

    async def start() -> None:
        urls = await server.start()
        await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)

    try:
        asyncio.run(start())
        yield server
    finally:
        asyncio.run(server.stop())
        shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture
async def urls(server: EmbeddedPostgres) -> AsyncIterator[Urls]:
    """Addresses of a fresh, migrated database."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    await _run(
        server.urls("postgres").owner,
        f"create database {name} template {DATABASE} strategy file_copy",
    )
    yield server.urls(name)
    await _run(server.admin_url("postgres"), f"drop database {name} with (force)")


async def _run(url: str, statement: str) -> None:
    con = await asyncpg.connect(url)
    try:
        await con.execute(statement)
    finally:
        await con.close()


@pytest.fixture
def admin_url(server: EmbeddedPostgres, urls: Urls) -> str:
    """The superuser's address of the test's database: to arrange what no role may."""
    return server.admin_url(urls.app.rsplit("@/", 1)[1].split("?", 1)[0])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file of `tests/golden`, or rewrite it under --renew-golden."""
    folder = Path(__file__).parent / "golden"

    def compare(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption("--renew-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, (
            f"tests/golden/{name} differs; if that is meant: pytest --renew-golden"
        )

    return compare


@pytest_asyncio.fixture
async def db(urls: Urls) -> AsyncIterator[Database]:
    """The application role's pool."""
    database = await Database.connect(urls.app)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def engine_db(urls: Urls) -> AsyncIterator[EngineDatabase]:
    """The engine role's pool."""
    database = await EngineDatabase.connect(urls.engine)
    yield database
    await database.close()


async def _new_org(db: Database, slug: str) -> int:
    async with db.globals() as con:
        org_id: int = await con.fetchval(
            "insert into org (slug, name) values ($1, $1) returning org_id", slug
        )
    return org_id


@pytest_asyncio.fixture
async def org(db: Database) -> int:
    """The id of a fresh org."""
    return await _new_org(db, "pond")


@pytest_asyncio.fixture
async def other_org(db: Database) -> int:
    """The id of another org, which must never see the first one's rows."""
    return await _new_org(db, "marsh")
