"""The ground that benchmarks stand on: a fresh embedded Postgres as the product runs it, and runs on it.

Called by `measures` and the suites. Invariant: nothing here exists only for speed; server options,
roles, events and heartbeats are the product's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import structlog

from millpond.db.embedded import DATABASE, EmbeddedPostgres, Urls
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.engine import ceilings
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow
from millpond.engine.retention import Keep
from millpond.engine.rules import Rule
from millpond.engine.submit import submit
from millpond.engine.worker import Worker
from millpond.types import NO_ORG, Intent

# 226 bytes of JSON; every peer is given the same.
PAYLOAD = orjson.dumps({"customer": "c-1042", "text": "x" * 193})
BATCH = 1000
SUBMITTERS = 4
# Where servers live; None: the system's folder for temporary files.
PLACE: Path | None = None


@dataclass
class Server:
    """One running Postgres: its addresses, and the superuser's for what no product may do."""

    urls: Urls
    admin_url: str = ""

    async def settle(self) -> None:
        """Do now what the server would do later beside somebody's measurement: vacuum, checkpoint."""
        await self.alter("vacuum (analyze)")
        await self.alter("checkpoint")

    async def alter(self, *statements: str) -> None:
        """Execute statements as the superuser."""
        con = await asyncpg.connect(self.admin_url)
        try:
            for statement in statements:
                await con.execute(statement)
        finally:
            await con.close()

    async def change(self, *statements: tuple[Any, ...]) -> None:
        """Execute statements with what they are given, as the superuser in one transaction."""
        con = await asyncpg.connect(self.admin_url)
        try:
            async with con.transaction():
                for statement, *given in statements:
                    await con.execute(statement, *given)
        finally:
            await con.close()

    async def ask(self, question: str) -> Any:
        """Return one value, asked as the superuser."""
        con = await asyncpg.connect(self.admin_url)
        try:
            return await con.fetchval(question)
        finally:
            await con.close()


@asynccontextmanager
async def postgres() -> AsyncIterator[Server]:
    """Start a fresh server with the product's options and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-bench-", dir=PLACE))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, owner_note="benchmarks")
    try:
        urls = await server.start()
        yield Server(urls, server.admin_url(DATABASE))
    finally:
        await server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Ground:
    """One migrated database with the application's and the engine's pools."""

    server: Server
    db: Database
    engine_db: EngineDatabase

    @property
    def urls(self) -> Urls:
        """The addresses of the database, one per role."""
        return self.server.urls

    async def org(self, name: str = "bench") -> int:
        """Make an org."""
        return (await self.orgs(1, name))[0]

    async def orgs(self, count: int, name: str = "bench") -> list[int]:
        """Make orgs; their slugs are never the same."""
        mark = time.time_ns()
        async with self.db.globals() as con:
            rows = await con.fetch(
                "insert into org (slug, name) "
                "select 'b' || $1::bigint || '-' || n, $3 from generate_series(1, $2::int) n "
                "returning org_id",
                mark,
                count,
                name,
            )
        return [row["org_id"] for row in rows]

    def intent(self, flow: Flow, org_id: int, data: bytes = PAYLOAD) -> Intent:
        """Make an intent of a flow."""
        return Intent(
            org_id=org_id,
            flow=flow.name,
            version=flow.version,
            queue=flow.queue,
            input=data,
            subject="user:bench",
            keys=(f"org:{org_id}",),
        )

    async def fill(
        self,
        flow: Flow,
        org_ids: Sequence[int],
        count: int,
        change: Callable[[Intent, int], Intent] = lambda intent, _: intent,
    ) -> None:
        """Submit `count` runs in bulk, spread over the orgs; `change` may alter the n-th of an org."""
        batches: asyncio.Queue[tuple[int, range]] = asyncio.Queue()
        for nth, org_id in enumerate(org_ids):
            mine = count // len(org_ids) + (nth < count % len(org_ids))
            for start in range(0, mine, BATCH):
                batches.put_nowait((org_id, range(start, min(start + BATCH, mine))))

        async def work() -> None:
            while not batches.empty():
                org_id, numbers = batches.get_nowait()
                intents = [change(self.intent(flow, org_id), n) for n in numbers]
                async with self.db.org(org_id) as con:
                    await submit(con, intents)

        async with asyncio.TaskGroup() as group:
            for _ in range(SUBMITTERS):
                group.create_task(work())

    async def settle(self) -> None:
        """See Server.settle."""
        await self.server.settle()

    async def limit(self, key: str, maximum: int) -> None:
        """Let only so many runs with a key go on at once, of all orgs together."""
        rule = Rule(owner=NO_ORG, key=key, kind="concurrency", maximum=maximum)
        async with self.db.globals() as con:
            await ceilings.set_limit(con, NO_ORG, rule, "user:bench")

    async def unlimit(self, key: str) -> None:
        """Take such a limit away."""
        async with self.db.globals() as con:
            await ceilings.remove_limit(con, NO_ORG, key, "concurrency")

    async def left(self, org_id: int | None = None) -> int:
        """Count runs that have not ended, of one org or of all."""
        return await self.count("item", "true" if org_id is None else f"org_id = {org_id}")

    async def count(self, table: str, where: str = "true") -> int:
        """Count rows of any org."""
        async with self.engine_db.duty("bench") as con:
            number: int = await con.fetchval(f"select count(*) from {table} where {where}")
        return number

    async def clear(self, flows: Sequence[Flow], slots: int) -> None:
        """Run what waits until nothing is left."""
        async with self.worker(flows, slots):
            while await self.left():
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def worker(
        self, flows: Sequence[Flow], slots: int, keep: Keep | None = None
    ) -> AsyncIterator[Worker]:
        """Run a worker with its heartbeat in this process; its steps get the application's pool.

        It prunes what is older than it keeps, and nothing if that is not said.
        """
        worker = Worker(
            database=self.engine_db,
            engine_url=self.urls.engine,
            listen_url=self.urls.engine,
            flows=flows,
            slots={"default": slots},
            resources={Database: self.db},
            keep=keep,
        )
        stop = asyncio.Event()
        running = asyncio.create_task(worker.run(stop))
        try:
            yield worker
        finally:
            stop.set()
            await running

    @asynccontextmanager
    async def hints(self) -> AsyncIterator[Hints]:
        """Send hints as the API does."""
        hints = await Hints.connect(self.urls.engine, near=True)
        try:
            yield hints
        finally:
            await hints.close()


@asynccontextmanager
async def open_ground(server: Server) -> AsyncIterator[Ground]:
    """Migrate a database and open its pools."""
    urls = server.urls
    await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
    try:
        yield Ground(server, db, engine_db)
    finally:
        await db.close()
        await engine_db.close()


@asynccontextmanager
async def ground() -> AsyncIterator[Ground]:
    """Start a fresh server, migrate it, and remove it afterwards."""
    async with postgres() as server, open_ground(server) as at:
        yield at


def end_on_sigterm() -> None:
    """Let SIGTERM cancel the current task, so that servers and processes are ended and not left behind."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def machine() -> str:
    """Describe the machine in a line: the number of cores is what matters."""
    return f"{os.cpu_count()} cores"


def quiet() -> None:
    """Let the engine log nothing below a warning, so that figures can be read."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
