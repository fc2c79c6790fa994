"""A running worker and short ways to submit and to wait for what happens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from tests.pooler import direct

from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.engine.events import Event, Feed, page, tail
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow, Registry, Step
from millpond.engine.retention import Keep
from millpond.engine.spilling import Spill
from millpond.engine.submit import submit
from millpond.engine.vault import Vault
from millpond.engine.worker import Worker
from millpond.identity.current_rights import CurrentRights
from millpond.types import Intent

DEADLINE_S = 40.0


@dataclass
class Pond:
    """One database with whatever workers a test starts on it."""

    urls: Urls
    db: Database
    engine_db: EngineDatabase
    org_id: int
    hints: Hints
    feed: Feed
    registry: Registry = field(default_factory=Registry)
    vault: Vault | None = None

    def flow(self, function: Callable[..., Awaitable[Any]], **options: Any) -> Flow:
        """Register a flow under its function's name."""
        from millpond.engine.registry import flow

        name = options.pop("name", function.__name__)
        return flow(name, registry=self.registry, **options)(function)

    def step(self, function: Callable[..., Any], **options: Any) -> Step[..., Any]:
        """Register a step under its function's name."""
        from millpond.engine.registry import step

        name = options.pop("name", function.__name__)
        return step(name, registry=self.registry, **options)(function)

    def intent(self, flow: Flow | str, data: Any = None, **options: Any) -> Intent:
        """Make an intent of a flow with JSON input."""
        name = flow if isinstance(flow, str) else flow.name
        return Intent(
            org_id=options.pop("org_id", self.org_id),
            flow=name,
            version=1,
            queue=options.pop("queue", "default" if isinstance(flow, str) else flow.queue),
            input=orjson.dumps(data),
            subject="user:test",
            keys=options.pop("keys", () if isinstance(flow, str) else flow.keys),
            **options,
        )

    async def submit(self, flow: Flow | str, data: Any = None, **options: Any) -> uuid.UUID:
        """Submit one run and hint its queue."""
        intent = self.intent(flow, data, **options)
        async with self.db.org(intent.org_id) as con:
            await submit(con, [intent])
        self.hints.wake([intent.queue])
        return intent.run_id

    async def events(self, run_id: uuid.UUID) -> list[Event]:
        """Read the run's events so far."""
        async with self.db.org(self.org_id) as con:
            return await page(con, self.org_id, run_id)

    async def kinds(self, run_id: uuid.UUID) -> list[str]:
        """Read the kinds of the run's events so far."""
        return [event.kind for event in await self.events(run_id)]

    async def until(self, run_id: uuid.UUID, kind: str, *, nth: int = 1) -> Event:
        """Wait for the n-th event of a kind."""
        async with asyncio.timeout(DEADLINE_S):
            async for event in tail(self.db, self.feed, self.org_id, run_id):
                if event.kind == kind:
                    nth -= 1
                    if nth == 0:
                        return event
        raise AssertionError(f"the run ended without {kind}: {await self.kinds(run_id)}")

    async def ended(self, run_id: uuid.UUID) -> dict[str, Any]:
        """Wait for the end of a run and return its row with JSON decoded."""
        async with asyncio.timeout(DEADLINE_S):
            async for _ in tail(self.db, self.feed, self.org_id, run_id):
                pass
        return await self.run_row(run_id)

    async def run_row(self, run_id: uuid.UUID) -> dict[str, Any]:
        """Read the run's wide row."""
        async with self.db.org(self.org_id) as con:
            row = await con.fetchrow("select * from run where run_id = $1", run_id)
        assert row is not None
        return {
            key: orjson.loads(value) if key in ("input", "output", "error") and value else value
            for key, value in row.items()
        }

    async def count(self, table: str, where: str = "true") -> int:
        """Count rows as the engine sees them."""
        async with self.engine_db.duty("test") as con:
            number: int = await con.fetchval(f"select count(*) from {table} where {where}")
        return number

    @asynccontextmanager
    async def worker(
        self,
        slots: Mapping[str, int] | None = None,
        *,
        flows: Sequence[Flow] | None = None,
        registry: Registry | None = None,
        labels: Mapping[str, str] | None = None,
        resources: Mapping[type, object] | None = None,
        lease_s: float = 2.0,
        drain_s: float = 5.0,
        keep: Keep | None = None,
        spill: Spill | None = None,
    ) -> AsyncIterator[Worker]:
        """Run a worker in this process until the block ends; begins once its flows are published and it is known.

        Another registry's flows and steps if given.
        """
        known = registry or self.registry
        worker = Worker(
            database=self.engine_db,
            engine_url=self.urls.engine,
            listen_url=direct(self.urls).engine,
            flows=list(known.flows.values()) if flows is None else flows,
            slots=slots or {"default": 20},
            steps=list(known.steps.values()),
            labels=labels or {},
            vault=self.vault,
            resources=resources,
            lease_s=lease_s,
            drain_s=drain_s,
            keep=keep,
            spill=spill,
            rights=CurrentRights(self.engine_db),
        )
        stop = asyncio.Event()
        running = asyncio.create_task(worker.run(stop))
        try:
            await self._until_known(worker, running)
            yield worker
        finally:
            stop.set()
            await running

    async def _until_known(self, worker: Worker, running: asyncio.Task[None]) -> None:
        """Wait until a worker has published its flows and opened its session; raises what ended it before that."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.count("worker", f"worker_id = '{worker.worker_id}'"):
                if running.done():
                    await running
                    return
                await asyncio.sleep(0.005)


@pytest.fixture
async def pond(
    urls: Urls, db: Database, engine_db: EngineDatabase, org: int
) -> AsyncIterator[Pond]:
    """A database with hints and a feed, and no worker yet."""
    hints = await Hints.connect(urls.engine)
    feed = await Feed.connect(direct(urls).engine)
    yield Pond(urls, db, engine_db, org, hints, feed)
    await feed.close()
    await hints.close()
