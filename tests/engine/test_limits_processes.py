"""Limits over three worker processes, some of them killed: what executes is counted at a sink."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import orjson
from tests.engine.conftest import Pond
from tests.engine.limited_process import limited
from tests.engine.test_limits import limit, over

SLOTS = 10
SINK_PROCESS = "tests.engine.limited_process"


@dataclass
class Sink:
    """Counts open connections, when each was opened, and who had them, in the order of their ends."""

    port: int = 0
    now: int = 0
    most: int = 0
    opened: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    async def busy(self) -> None:
        """Wait until somebody is connected."""
        async with asyncio.timeout(20):
            while not self.now:
                await asyncio.sleep(0.002)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Count one connection until the other end, or its process, is gone."""
        self.opened.append(time.monotonic())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            self.names.append((await reader.read()).decode())
        except ConnectionError:
            pass
        finally:
            self.now -= 1
            writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Sink]:
    sink = Sink()
    server = await asyncio.start_server(sink.serve, "127.0.0.1", 0)
    sink.port = server.sockets[0].getsockname()[1]
    try:
        yield sink
    finally:
        server.close()


async def begin(
    pond: Pond,
    module: str = SINK_PROCESS,
    slots: int = SLOTS,
    lease_s: float = 2.0,
) -> asyncio.subprocess.Process:
    """Start a worker process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    orders = {"engine": pond.urls.engine, "lease_s": lease_s, "slots": slots}
    process.stdin.write(orjson.dumps(orders) + b"\n")
    await process.stdin.drain()
    return process


@asynccontextmanager
async def processes_of(
    pond: Pond, count: int, module: str, slots: int
) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Worker processes; whichever stand in the list at the end are ended."""
    processes = [await begin(pond, module, slots) for _ in range(count)]
    try:
        async with asyncio.timeout(30):
            while await pond.count("worker", "expires_at > clock_timestamp()") < count:
                await asyncio.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
        for process in processes:
            await process.wait()


def three(pond: Pond) -> AbstractAsyncContextManager[list[asyncio.subprocess.Process]]:
    """Three worker processes whose runs are seen at a sink."""
    return processes_of(pond, 3, SINK_PROCESS, SLOTS)


async def kill_one(pond: Pond, processes: list[asyncio.subprocess.Process], nth: int) -> None:
    """Kill a worker while it holds leases, and start another one in its place."""
    processes[nth].kill()
    await processes[nth].wait()
    processes[nth] = await begin(pond)


async def submit_held(pond: Pond, sink: Sink, count: int, for_s: float) -> None:
    """Submit runs that hold a connection to the sink."""
    data = {"port": sink.port, "for_s": for_s}
    for _ in range(count):
        await pond.submit(limited, data)


async def test_never_more_than_the_limit_over_processes_that_are_killed_and_edits(
    pond: Pond,
) -> None:
    async with listening() as sink:
        await limit(pond.db, "provider:sink", 4)
        await submit_held(pond, sink, 160, 0.08)
        async with three(pond) as processes:
            for nth in (0, 1, 2):
                await asyncio.sleep(0.7)
                await sink.busy()
                await kill_one(pond, processes, nth)
            assert sink.most == 4
            await limit(pond.db, "provider:sink", 2)
            await asyncio.sleep(0.5)
            async with asyncio.timeout(20):
                while await pond.count("lease") > 2 or sink.now > 2:
                    await asyncio.sleep(0.01)
            sink.most = 0
            await asyncio.sleep(0.7)
            assert sink.most <= 2
            await limit(pond.db, "provider:sink", 6)
            await submit_held(pond, sink, 40, 0.08)  # however many of the first are left by now
            await over(pond, limited, 200, within_s=60)
            assert sink.most == 6


async def test_a_rate_holds_over_processes_at_whoever_is_called(pond: Pond) -> None:
    rate, burst = 40, 4
    async with listening() as sink:
        await limit(pond.db, "provider:sink", rate, kind="rate", period_s=1.0, burst=burst)
        async with three(pond) as processes:
            await submit_held(pond, sink, 200, 0.01)
            await asyncio.sleep(1.5)
            await kill_one(pond, processes, 0)
            await over(pond, limited, 200, within_s=60)
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch(
            "select extract(epoch from at)::float8 as at from event"
            " where kind in ('run.started', 'run.resumed') order by at"
        )
    claims = [row["at"] for row in rows]
    for nth, start in enumerate(claims):
        for count, end in enumerate(claims[nth:], 1):
            assert count <= rate * (end - start + 0.25) + burst
    opened = sorted(sink.opened)
    assert len(claims) >= len(opened) >= 200
    assert len(opened) <= rate * (opened[-1] - opened[0] + 1.0) + burst


async def test_a_killed_workers_places_are_free_again_after_its_rescue(pond: Pond) -> None:
    async with listening() as sink:
        await limit(pond.db, "provider:sink", 2)
        async with three(pond) as processes:
            await submit_held(pond, sink, 2, 600.0)
            async with asyncio.timeout(20):
                while sink.now < 2:
                    await asyncio.sleep(0.02)
            for nth in (0, 1, 2):
                await kill_one(pond, processes, nth)
            async with asyncio.timeout(20):
                while sink.now < 2:
                    await asyncio.sleep(0.02)
            assert sink.most == 2
            for process in processes:
                process.kill()
