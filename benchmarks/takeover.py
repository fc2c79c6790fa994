"""Takeover: how long a run waits for another worker after its worker was killed with SIGKILL.

Run by `python -m benchmarks.takeover [--kills N]`; workers have the product's own lease time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import uvloop

from benchmarks.figures import Figure, store
from benchmarks.ground import Ground, ground, machine
from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context
from millpond.engine.registry import Registry, flow
from millpond.engine.submit import submit
from millpond.engine.worker import Worker

REGISTRY = Registry()
RUNS = 10  # held by the worker at each kill
# Above a lease: right after a start of Postgres rescue waits, since then nobody could have beaten.
YOUNG_S = 8.0


@flow("bench.hold", registry=REGISTRY)
async def hold(ctx: Context, data: dict[str, str]) -> None:
    """Stay until the end of the benchmark."""
    await asyncio.Event().wait()


async def work(url: str) -> None:
    """Be the worker that is killed."""
    database = await EngineDatabase.connect(url)
    worker = Worker(
        database=database,
        engine_url=url,
        listen_url=url,
        flows=REGISTRY.select([]),
        slots={"default": RUNS},
    )
    await worker.run(asyncio.Event())


@asynccontextmanager
async def worker_process(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a worker in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.takeover",
        "--work",
        env={**os.environ, "BENCH_ENGINE_URL": url},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _times(at: Ground, kind: str, org_id: int, count: int) -> list[datetime]:
    """Wait until there are so many events of a kind, then return when they were."""
    while True:
        async with at.db.org(org_id) as con:
            rows = await con.fetch("select at from event where kind = $1", kind)
        if len(rows) >= count:
            return [row["at"] for row in rows]
        await asyncio.sleep(0.02)


async def takeover(at: Ground, nth: int) -> list[float]:
    """Kill the worker that holds the runs while another has room; return the waits in seconds."""
    org_id = await at.org(f"takeover-{nth}")
    async with worker_process(at.urls.engine) as victim:
        async with at.db.org(org_id) as con:
            await submit(con, [at.intent(hold, org_id) for _ in range(RUNS)])
        await _times(at, "run.started", org_id, RUNS)
        async with worker_process(at.urls.engine):
            await _until_two(at)
            async with at.db.globals() as con:
                killed_at = await con.fetchval("select clock_timestamp()")
            victim.kill()
            resumed = await _times(at, "run.resumed", org_id, RUNS)
    await _clear(at)
    return [(moment - killed_at).total_seconds() for moment in resumed]


async def _until_two(at: Ground) -> None:
    """Wait until a second worker is there."""
    while True:
        async with at.engine_db.duty("bench") as con:
            if await con.fetchval("select count(*) from worker") >= 2:
                return
        await asyncio.sleep(0.02)


async def _clear(at: Ground) -> None:
    """Take the killed workers' runs and sessions out of the way of the next round."""
    async with at.engine_db.duty("bench") as con:
        for table in ("lease", "ready", "arrival", "lane", "item", "worker"):
            await con.execute(f"delete from {table}")


async def measure(kills: int) -> list[Figure]:
    """Return the waits of all runs of all kills, by their median and their 95th percentile."""
    waits: list[float] = []
    async with ground() as at:
        await asyncio.sleep(YOUNG_S)
        for nth in range(kills):
            waits += await takeover(at, nth)
            print(f"kill {nth + 1} of {kills}: {max(waits[-RUNS:]):.2f} s", flush=True)
    p95_s = statistics.quantiles(waits, n=20, method="inclusive")[-1]
    median = Figure.of("takeover", "takeover after kill -9, median", "s", waits)
    return [median, replace(median, figure="takeover after kill -9, p95", median=p95_s)]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        uvloop.run(work(os.environ["BENCH_ENGINE_URL"]))
        return
    figures = uvloop.run(measure(given.kills))
    print(f"\nMillpond on {machine()}, {given.kills} kills of a worker with {RUNS} runs each")
    for figure in figures:
        print(figure.line())
    print(f"\nwritten to {store(figures, Path('benchmarks/out/takeover'))}")


if __name__ == "__main__":
    main()
