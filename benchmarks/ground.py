"""The ground that benchmarks stand on: a fresh embedded Postgres as the product runs it, runs, figures.

Called by the suites. Invariant: nothing here exists only for speed; server options, roles, events and
heartbeats are the product's own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from millpond.db.embedded import EmbeddedPostgres, Urls
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow
from millpond.engine.submit import submit
from millpond.engine.worker import Worker
from millpond.types import Intent

# 226 bytes of JSON, as the peers in docs/performance.md were given.
PAYLOAD = orjson.dumps({"customer": "c-1042", "text": "x" * 193})


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure: its median and every run behind it."""

    suite: str
    system: str
    figure: str
    unit: str
    median: float
    runs: Sequence[float]

    @classmethod
    def of(cls, suite: str, figure: str, unit: str, runs: Sequence[float]) -> Figure:
        """Make a figure of Millpond's from its runs."""
        return cls(
            suite=suite,
            system="millpond",
            figure=figure,
            unit=unit,
            median=statistics.median(runs),
            runs=list(runs),
        )

    def line(self) -> str:
        """Return the figure as a line of text with its spread."""
        low, high = min(self.runs), max(self.runs)
        return f"{self.figure:<44}{self.median:>12,.2f} {self.unit:<8} ({low:,.2f} to {high:,.2f})"


def store(figures: Sequence[Figure], folder: Path = Path("benchmarks/out")) -> Path:
    """Write the figures as JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "latest.json"
    raw = orjson.dumps([asdict(figure) for figure in figures], option=orjson.OPT_INDENT_2)
    path.write_bytes(raw + b"\n")
    return path


@dataclass
class Ground:
    """One fresh database with the application's and the engine's pools."""

    urls: Urls
    db: Database
    engine_db: EngineDatabase

    async def org(self, slug: str) -> int:
        """Make an org."""
        async with self.db.globals() as con:
            org_id: int = await con.fetchval(
                "insert into org (slug, name) values ($1, $1) returning org_id", slug
            )
        return org_id

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

    async def fill(self, flow: Flow, org_ids: Sequence[int], count: int) -> None:
        """Submit `count` runs in bulk, spread over the orgs."""
        for nth, org_id in enumerate(org_ids):
            mine = count // len(org_ids) + (nth < count % len(org_ids))
            for start in range(0, mine, 1000):
                batch = [self.intent(flow, org_id) for _ in range(min(1000, mine - start))]
                async with self.db.org(org_id) as con:
                    await submit(con, batch)

    async def left(self) -> int:
        """Count runs that have not ended."""
        async with self.engine_db.duty("bench") as con:
            number: int = await con.fetchval("select count(*) from item")
        return number

    @asynccontextmanager
    async def worker(self, flows: Sequence[Flow], slots: int) -> AsyncIterator[Worker]:
        """Run a worker with its heartbeat in this process."""
        worker = Worker(
            database=self.engine_db,
            engine_url=self.urls.engine,
            listen_url=self.urls.engine,
            flows=flows,
            slots={"default": slots},
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
        hints = await Hints.connect(self.urls.engine)
        try:
            yield hints
        finally:
            await hints.close()


@asynccontextmanager
async def ground() -> AsyncIterator[Ground]:
    """Start a fresh server, migrate it, and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-bench-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, owner_note="benchmarks")
    urls = await server.start()
    try:
        await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
        db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
        try:
            yield Ground(urls, db, engine_db)
        finally:
            await db.close()
            await engine_db.close()
    finally:
        await server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """Describe the machine in a line: the number of cores is what matters."""
    return f"{os.cpu_count()} cores"
