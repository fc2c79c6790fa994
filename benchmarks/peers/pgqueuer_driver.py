"""The driver of PgQueuer: jobs in a Postgres table, fetched in batches.

Run by `benchmarks.systems` in the peers' environment. Settings, by its performance guide: asyncpg under
uvloop, one connection for the queue manager and a pool for producers, batches of 100 (the default is
10), its autovacuum settings applied, tables durable (the default). Three steps are three jobs, each
enqueued by the handler of the one before. Tenants beside each other have an entrypoint each, limited to
less than the worker's jobs at once; batches are then of half of those, the most that it allows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import uvloop
import wire
from pgqueuer import PgQueuer
from pgqueuer.models import Job
from pgqueuer.queries import Queries

SLOTS_OF_A_BATCH = 100
PRODUCERS = 8
INSERT = "insert into public.bare (data) values ($1)"


class Bench:
    """The orders of the wire, on one database."""

    def __init__(self, loop: asyncio.AbstractEventLoop, url: str) -> None:
        self._loop = loop
        self._url = url
        self._starts = 0
        self._began = 0.0
        self._mark: asyncio.Future[float] = loop.create_future()
        self._naps: wire.Naps = {}

    async def open(self) -> None:
        """Install the tables; open the producers' pool."""
        self._con = await asyncpg.connect(self._url)
        installer = Queries.from_asyncpg_connection(self._con)
        await installer.install()
        await installer.optimize_autovacuum()
        await self._con.execute(
            "create table public.bare (id bigint generated always as identity primary key, data text)"
        )
        self._pool = await asyncpg.create_pool(self._url, min_size=1, max_size=PRODUCERS)
        self._producer = Queries.from_asyncpg_pool(self._pool)

    def _start(self) -> None:
        if not self._starts:
            self._began = time.perf_counter()
        self._starts += 1

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[None]:
        con = await asyncpg.connect(self._url)
        made = PgQueuer.from_asyncpg_connection(con)
        producer = self._producer

        @made.entrypoint("noop")
        async def noop(job: Job) -> None:
            self._start()

        @made.entrypoint("mark")
        async def mark(job: Job) -> None:
            self._mark.set_result(time.perf_counter())

        @made.entrypoint("first")
        async def first(job: Job) -> None:
            self._start()
            await producer.enqueue("second", job.payload)

        @made.entrypoint("second")
        async def second(job: Job) -> None:
            await producer.enqueue("third", job.payload)

        @made.entrypoint("third")
        async def third(job: Job) -> None:
            return None

        running = asyncio.create_task(made.qm.run(batch_size=SLOTS_OF_A_BATCH))
        try:
            yield
        finally:
            made.shutdown.set()
            await running
            await con.close()

    @asynccontextmanager
    async def _shared_worker(self) -> AsyncIterator[None]:
        con = await asyncpg.connect(self._url)
        made = PgQueuer.from_asyncpg_connection(con)

        async def nap(job: Job) -> None:
            began = time.perf_counter()
            await asyncio.sleep(wire.NAP_S)
            self._naps[f"{job.entrypoint}{job.id}"] = (began, time.perf_counter())

        for tenant in ("a", "b"):
            made.entrypoint(tenant, concurrency_limit=wire.SLOTS_OF_ONE)(nap)
        running = asyncio.create_task(
            made.qm.run(batch_size=wire.SHARED_SLOTS // 2, max_concurrent_tasks=wire.SHARED_SLOTS)
        )
        try:
            yield
        finally:
            made.shutdown.set()
            await running
            await con.close()

    async def _share(self, count: int, visits: int) -> tuple[wire.Naps, dict[str, float]]:
        """Drain what A has queued while B comes by; returns the rests, and when each of B's was sent."""
        sent: dict[str, float] = {}
        self._naps.clear()
        await self._fill("a", count)
        async with self._shared_worker():
            while not self._naps:
                await asyncio.sleep(0.001)
            start, payload = time.perf_counter(), wire.PAYLOAD.encode()
            for n in range(visits):
                await asyncio.sleep(max(0.0, start + n * wire.EVERY_S - time.perf_counter()))
                began = time.perf_counter()
                (job_id,) = await self._producer.enqueue("b", payload)
                sent[f"b{job_id}"] = began
            while len(self._naps) < count + visits:
                await asyncio.sleep(0.005)
            await self._empty()
        return dict(self._naps), sent

    async def _fill(self, name: str, count: int) -> None:
        payload = wire.PAYLOAD.encode()
        for size in wire.batches(count):
            await self._producer.enqueue([name] * size, [payload] * size, [0] * size)

    async def _empty(self) -> None:
        while await self._con.fetchval("select exists (select from pgqueuer)"):
            await asyncio.sleep(0.005)

    async def _clear(self) -> None:
        async with self._worker():
            await self._empty()

    async def _drain(self, name: str, count: int) -> wire.Answer:
        await self._fill(name, count)
        self._starts = 0
        async with self._worker():
            while self._starts < count:
                await asyncio.sleep(0.005)
            await self._empty()
            took_s = time.perf_counter() - self._began
        return {"took_s": took_s}

    async def submit(self, count: int) -> wire.Answer:
        """Enqueue one at a time, beside the yardsticks of a commit."""
        payload = wire.PAYLOAD.encode()
        insert = await self._con.prepare(INSERT)

        async def transaction() -> None:
            async with self._con.transaction():
                await insert.fetch(wire.PAYLOAD)

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: self._producer.enqueue("noop", payload),
            lambda: insert.fetch(wire.PAYLOAD),
            transaction,
        ]
        took: list[list[float]] = [[], [], []]
        for _ in range(count + 1):
            for call, seconds in zip(calls, took, strict=True):
                began = time.perf_counter()
                await call()
                seconds.append(time.perf_counter() - began)
        await self._clear()
        names = ("took_s", "commits_s", "transactions_s")
        return {name: seconds[1:] for name, seconds in zip(names, took, strict=True)}

    async def bulk(self, count: int) -> wire.Answer:
        """Enqueue 1,000 in each call."""
        began = time.perf_counter()
        await self._fill("noop", count)
        took_s = time.perf_counter() - began
        await self._clear()
        return {"took_s": took_s}

    async def drain(self, count: int) -> wire.Answer:
        """Drain no-op jobs."""
        return await self._drain("noop", count)

    async def steps(self, count: int) -> wire.Answer:
        """Drain chains of three jobs."""
        return await self._drain("first", count)

    async def noisy(self, count: int) -> wire.Answer:
        """Drain what A has queued, with B and without."""
        await self._share(max(1, count // 10), 0)
        beside, sent = await self._share(count, wire.visits(count))
        alone, _ = await self._share(count, 0)
        return wire.noisy(beside, alone, sent)

    async def idle(self, count: int) -> wire.Answer:
        """Enqueue while the worker is idle."""
        took, payload = [], wire.PAYLOAD.encode()
        async with self._worker():
            await asyncio.sleep(wire.SETTLED_S)
            for _ in range(count):
                self._mark = self._loop.create_future()
                began = time.perf_counter()
                await self._producer.enqueue("mark", payload)
                took.append(await self._mark - began)
                await asyncio.sleep(wire.PAUSE_S)
            await self._empty()
        return {"took_s": took}


def main() -> None:
    """Set up, then answer orders."""
    answers = wire.take_stdout()
    loop = uvloop.new_event_loop()
    bench = Bench(loop, wire.read_setup()["postgres"])
    loop.run_until_complete(bench.open())

    def order(name: str) -> Callable[[int], wire.Answer]:
        return lambda count: loop.run_until_complete(getattr(bench, name)(count))

    names = ("submit", "bulk", "drain", "steps", "idle", "noisy")
    wire.serve({name: order(name) for name in names}, answers)


if __name__ == "__main__":
    main()
