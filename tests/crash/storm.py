"""Chaos: mixed runs are submitted while workers are killed and stopped and Postgres is restarted at random.

Used by test_storm.py (a minute) and tests/soak (many). Invariant: nothing here helps the engine along; the one
favour is that deaths are forgotten, so that killing at random makes no suspects of innocent runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
from tests.conftest import TEST_OPTIONS
from tests.crash.sink import Sink
from tests.crash.workload import People, mixed, worker_process

from millpond.db.embedded import EmbeddedPostgres
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import MillpondError

LEASE_S = 2.0
WORKERS = 3
# A stop is at times shorter and at times longer than a lease.
STOP_S = (0.5, 2.5 * LEASE_S)
LAST_S = 90.0


class Storm:
    """A database of its own, three workers, and what happens to them."""

    def __init__(self, server: EmbeddedPostgres, people: People, sink: Sink) -> None:
        self._server = server
        self._people = people
        self._sink = sink
        self._urls = server.urls("millpond")
        self._stack = AsyncExitStack()
        self._workers: list[asyncio.subprocess.Process] = []
        self.toll: Counter[str] = Counter()

    async def rage(self, length_s: float) -> None:
        """Submit and hurt for a while, then wait until every run has ended."""
        until = time.monotonic() + length_s
        async with self._stack, asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                await self._start()
            helping = [group.create_task(self._forgive()), group.create_task(self._people.decide())]
            await asyncio.gather(self._submit(until), self._hurt(until))
            await self._people.until_left((), LAST_S)
            for task in helping:
                task.cancel()
        died = [
            worker.returncode for worker in self._workers if worker.returncode != -signal.SIGKILL
        ]
        assert not died, f"workers ended by themselves: {died}"

    async def _start(self) -> None:
        started = worker_process(self._urls.engine, self._sink, lease_s=LEASE_S, slots=20)
        self._workers.append(await self._stack.enter_async_context(started))

    async def _submit(self, until: float) -> None:
        """Submit a round of runs every moment; one without an answer is not counted on."""
        while time.monotonic() < until:
            with contextlib.suppress(MillpondError):
                await self._people.submit(mixed(self._people.org_id))
                self.toll["rounds"] += 1
            await asyncio.sleep(0.4)

    async def _hurt(self, until: float) -> None:
        """Do one bad thing after the other, the first three each another; restarts are the rarest."""
        ways: list[Callable[[], Awaitable[None]]] = [self._kill, self._stop]
        random.shuffle(ways)
        nth = 0
        while time.monotonic() < until or nth < 3:
            nth += 1
            await asyncio.sleep(random.uniform(0.3, 1.5))
            way = ways[nth - 1] if nth <= 2 else random.choice(ways)
            await (self._restart if nth % 7 == 3 else way)()

    async def _kill(self) -> None:
        worker = self._workers.pop(random.randrange(len(self._workers)))
        worker.kill()
        await worker.wait()
        self.toll["kills"] += 1
        await self._start()

    async def _stop(self) -> None:
        worker = random.choice(self._workers)
        worker.send_signal(signal.SIGSTOP)
        await asyncio.sleep(random.uniform(*STOP_S))
        worker.send_signal(signal.SIGCONT)
        self.toll["stops"] += 1

    async def _restart(self) -> None:
        """Restart Postgres in immediate mode: every connection is cut, memory is lost."""
        pid = self._server.pid
        assert pid is not None
        os.kill(pid, signal.SIGQUIT)
        while self._server.is_alive:
            await asyncio.sleep(0.01)
        await self._server.stop()
        await self._server.start()
        self.toll["restarts"] += 1

    async def _forgive(self) -> None:
        admin_url = self._server.admin_url("millpond")
        while True:
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                con = await asyncpg.connect(admin_url)
                try:
                    while True:
                        await con.execute("update millpond.item set deaths = 0 where deaths > 0")
                        await asyncio.sleep(0.2)
                finally:
                    con.terminate()
            await asyncio.sleep(0.2)


@asynccontextmanager
async def sky(data_dir: Path, sink: Sink) -> AsyncIterator[tuple[Storm, People, EngineDatabase]]:
    """A server of its own, that a storm may restart, with an org and people."""
    server = EmbeddedPostgres(data_dir, owner_note="tests", options=TEST_OPTIONS)
    urls = await server.start()
    try:
        await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
        db, engine_db = await Database.connect(urls.app), await EngineDatabase.connect(urls.engine)
        async with db.globals() as con:
            sql = "insert into org (slug, name) values ('storm', 'Storm') returning org_id"
            people = People(db, await con.fetchval(sql), sink)
        yield Storm(server, people, sink), people, engine_db
        await db.close()
        await engine_db.close()
    finally:
        await server.stop()
