"""A database for state machines: one per test, with a loop of its own, emptied before each example."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import asyncpg
import pytest

from millpond.db.embedded import DATABASE, EmbeddedPostgres
from millpond.db.pool import Database, EngineDatabase
from millpond.db.queries import queries
from millpond.engine.commit import Committer
from millpond.engine.hints import Hints

R = TypeVar("R")
# Rescue waits one lease after a start of Postgres; the rescues of a state machine wait for nothing.
LEASE_S = 2.0


@dataclass
class Ground:
    """The database that all examples of one test use, emptied before each."""

    loop: asyncio.AbstractEventLoop
    admin: asyncpg.Connection[asyncpg.Record]
    db: Database
    engine_db: EngineDatabase
    committer: Committer
    org_ids: list[int]
    tables: list[str]

    def run(self, work: Awaitable[R]) -> R:
        """Let the loop run until this is done."""
        return self.loop.run_until_complete(work)

    async def empty(self) -> None:
        """Remove every row of the engine."""
        await self.admin.execute(f"truncate {', '.join(self.tables)}")


async def _open(server: EmbeddedPostgres, name: str) -> Ground:
    postgres = await asyncpg.connect(server.urls("postgres").owner)
    await postgres.execute(f"create database {name} template {DATABASE} strategy file_copy")
    await postgres.close()
    admin = await asyncpg.connect(server.admin_url(name))
    while await admin.fetchval(queries("maintenance")["take_turn"], column=2) < LEASE_S:
        await asyncio.sleep(0.1)
    urls = server.urls(name)
    db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
    org_ids = []
    for slug in ("pond", "marsh"):
        async with db.globals() as con:
            sql = "insert into org (slug, name) values ($1, $1) returning org_id"
            org_ids.append(await con.fetchval(sql, slug))
    rows = await admin.fetch(
        "select table_name from information_schema.columns where table_schema = 'millpond'"
        " and column_name in ('org_id', 'worker_id', 'virtual_s') and table_name <> 'org'"
    )
    tables = sorted({f"millpond.{row[0]}" for row in rows})
    committer = Committer(engine_db, Hints(urls.engine), on_cancel_requested=lambda _: None)
    committer.start()
    loop = asyncio.get_running_loop()
    return Ground(loop, admin, db, engine_db, committer, org_ids, tables)


@pytest.fixture
def ground(server: EmbeddedPostgres) -> Iterator[Ground]:
    """A fresh database with a loop of its own, since Hypothesis calls rules without one."""
    name = f"test_{uuid.uuid4().hex[:12]}"

    async def close(ground: Ground) -> None:
        await ground.committer.close()
        await ground.db.close()
        await ground.engine_db.close()
        await ground.admin.close()
        postgres = await asyncpg.connect(server.admin_url("postgres"))
        await postgres.execute(f"drop database {name} with (force)")
        await postgres.close()

    with asyncio.Runner() as runner:
        ground = runner.run(_open(server, name))
        yield ground
        runner.run(close(ground))
