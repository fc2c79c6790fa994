"""A worker process of its own: composed as `millpond worker` composes it, with the benchmarks' flows.

Run by the suites `scale`, `waiting` and `blocked` as `python -m benchmarks.worker`. Standard input: one JSON line
with the addresses and the number of slots; SIGTERM drains and ends it.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import orjson

from benchmarks.flows import REGISTRY
from benchmarks.ground import quiet
from millpond.cli.loop import run_loop
from millpond.db.embedded import Urls
from millpond.db.pool import EngineDatabase
from millpond.engine.worker import Worker

_END_S = 60.0
_DRAIN_S = 20.0


@asynccontextmanager
async def worker_process(
    urls: Urls, slots: int, *, drain_s: float = _DRAIN_S
) -> AsyncIterator[int]:
    """Run a worker process; gives its process id. At its end its runs have so many seconds left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.worker", stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    orders = {"urls": asdict(urls), "slots": slots, "drain_s": drain_s}
    process.stdin.write(orjson.dumps(orders) + b"\n")
    await process.stdin.drain()
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def work() -> None:
    """Work until SIGTERM."""
    orders = orjson.loads(sys.stdin.readline())
    urls = Urls(**orders["urls"])
    database = await EngineDatabase.connect(urls.engine)
    worker = Worker(
        database=database,
        engine_url=urls.engine,
        listen_url=urls.engine,
        flows=list(REGISTRY.flows.values()),
        slots={"default": orders["slots"]},
        drain_s=orders["drain_s"],
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()


if __name__ == "__main__":
    quiet()
    run_loop(work())
