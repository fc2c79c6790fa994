"""Migrations: once each, whole or not at all, and a start on another schema is refused."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from millpond.db import migrate as migrations
from millpond.db.embedded import EmbeddedPostgres, Urls
from millpond.db.migrate import EXTENSIONS, Patience, check_schema, migrate, revisions
from millpond.errors import Permanent, SchemaMismatch, Unavailable


async def run(url: str, *statements: str) -> None:
    con = await asyncpg.connect(url)
    try:
        for statement in statements:
            await con.execute(statement)
    finally:
        await con.close()


@pytest_asyncio.fixture
async def empty(server: EmbeddedPostgres) -> AsyncIterator[Urls]:
    """Addresses of a database with the extensions and nothing else."""
    name = f"empty_{uuid.uuid4().hex[:12]}"
    await run(server.urls("postgres").owner, f"create database {name}")
    await run(server.admin_url(name), *(f"create extension {one}" for one in EXTENSIONS))
    yield server.urls(name)
    await run(server.admin_url("postgres"), f"drop database {name} with (force)")


async def migrated(urls: Urls, patience: Patience | None = None) -> list[str]:
    return await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine, patience=patience)


async def test_each_migration_runs_once_and_in_order(empty: Urls) -> None:
    assert await migrated(empty) == revisions()
    assert revisions() == sorted(revisions())
    assert await migrated(empty) == []
    await check_schema(empty.app)
    await check_schema(empty.engine)


async def test_two_migrations_at_once_do_the_work_once(empty: Urls) -> None:
    ran = await asyncio.gather(migrated(empty), migrated(empty), migrated(empty))
    assert sorted(ran, key=len) == [[], [], revisions()]


async def test_a_database_without_schema_is_older(empty: Urls) -> None:
    with pytest.raises(SchemaMismatch) as caught:
        await check_schema(empty.app)
    assert caught.value.code == "schema_older"
    assert caught.value.advice == "Run `millpond migrate`."


async def test_a_database_behind_the_code_is_older(empty: Urls, more: Path) -> None:
    await migrated(empty)
    await check_schema(empty.app)
    (more / "9998_later.sql").write_text("create table later ();")
    with pytest.raises(SchemaMismatch, match="needs 9998") as caught:
        await check_schema(empty.app)
    assert caught.value.code == "schema_older"
    assert await migrated(empty) == ["9998"]
    await check_schema(empty.app)


async def test_a_database_ahead_of_the_code_is_newer(urls: Urls) -> None:
    await run(urls.owner, "update millpond.schema_revision set version_num = '9999'")
    with pytest.raises(SchemaMismatch, match="migrated by a newer Millpond") as caught:
        await check_schema(urls.engine)
    assert caught.value.code == "schema_newer"
    with pytest.raises(SchemaMismatch):
        await migrated(urls)


@pytest.fixture
def more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the migrations, to which a test adds."""
    for path in migrations._migration_files(migrations._folder()):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(migrations, "_folder", lambda: tmp_path)
    return tmp_path


async def test_a_failing_migration_changes_nothing_and_is_named(urls: Urls, more: Path) -> None:
    (more / "9998_fine.sql").write_text("create table fine (one integer);")
    (more / "9999_wrong.sql").write_text("create table half (); insert into absent values (1);")
    with pytest.raises(Permanent, match=r"9999_wrong\.sql failed and changed nothing") as caught:
        await migrated(urls)
    assert caught.value.code == "migration_failed"
    con = await asyncpg.connect(urls.app)
    assert await con.fetchval("select max(version_num) from schema_revision") == "9998"
    assert await con.fetchval("select to_regclass('millpond.fine')") is not None
    assert await con.fetchval("select to_regclass('millpond.half')") is None
    await con.close()
    (more / "9999_wrong.sql").write_text("create table half ();")
    assert await migrated(urls) == ["9999"]


async def _held(urls: Urls) -> asyncpg.Connection:
    """Hold a table as a long report does, in a transaction that has read it."""
    con = await asyncpg.connect(urls.app)
    await con.execute("begin")
    await con.execute("select from millpond.worker limit 1")
    return con


async def test_a_migration_behind_a_long_transaction_gives_up_and_holds_up_nobody(
    urls: Urls, more: Path
) -> None:
    (more / "9998_fine.sql").write_text("create table fine (one integer);")
    (more / "9999_locks.sql").write_text("alter table worker add column more integer;")
    report = await _held(urls)
    patience = Patience(lock_s=0.2, tries=3, pause_s=0.0)
    with pytest.raises(Unavailable, match=r"9999_locks\.sql waits .* tried 3 times") as caught:
        await migrated(urls, patience)
    assert caught.value.code == "migration_waits"
    pid = await report.fetchval("select pg_backend_pid()")
    assert f"sessions {pid})" in (caught.value.advice or "")
    # Whoever only reads waits for nobody; what ran before stays, and the next time only the rest is run.
    other = await asyncpg.connect(urls.app)
    await other.execute("set lock_timeout = 1; select from millpond.worker limit 1")
    assert await other.fetchval("select max(version_num) from millpond.schema_revision") == "9998"
    await other.close()
    await report.close()
    assert await migrated(urls) == ["9999"]


async def test_a_migration_goes_on_as_soon_as_what_it_waited_for_is_over(
    urls: Urls, more: Path
) -> None:
    """Between two tries others go first: the lock that it waits for stands before nobody then."""
    (more / "9999_locks.sql").write_text("alter table worker add column more integer;")
    report = await _held(urls)
    migrating = asyncio.create_task(migrated(urls, Patience(lock_s=0.2, tries=1000, pause_s=0.05)))
    watcher = await asyncpg.connect(urls.owner)
    async with asyncio.timeout(20):
        while not await watcher.fetchval(
            "select count(*) from pg_locks where not granted and mode = 'AccessExclusiveLock'"
        ):
            await asyncio.sleep(0.01)
        # It waits before this one, and gives way to it.
        await watcher.execute("select from millpond.worker limit 1")
    assert not migrating.done()
    await report.close()
    await watcher.close()
    async with asyncio.timeout(20):
        assert await migrating == ["9999"]


async def test_two_files_with_one_number_are_refused(more: Path) -> None:
    (more / "0001_again.sql").write_text("select 1;")
    with pytest.raises(ValueError, match="share a number"):
        revisions()


async def test_what_the_owner_may_not_do_is_named(server: EmbeddedPostgres) -> None:
    """The extension for vectors needs an administrator on most servers."""
    name = f"bare_{uuid.uuid4().hex[:12]}"
    urls = server.urls(name)
    await run(server.urls("postgres").owner, f"create database {name}")
    with pytest.raises(Permanent, match="create extension if not exists vector") as caught:
        await migrated(urls)
    assert "administrator" in (caught.value.advice or "")
    await run(server.admin_url("postgres"), f"drop database {name} with (force)")


async def test_a_role_that_passes_over_row_security_may_not_serve(admin_url: str) -> None:
    with pytest.raises(Permanent, match="row-level security") as caught:
        await check_schema(admin_url)
    assert caught.value.code == "role_too_powerful"
