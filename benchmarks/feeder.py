"""The feeder: keeps a backlog at its depth by submitting, in a process of its own, what was drained.

Run by `steady` as `python -m benchmarks.feeder`, since a producer that shared the worker's event loop
would be measured with it. Standard input: a JSON line with the addresses, then how many runs to add;
each number is answered by itself once those runs are committed; a 0 tells that it is ready.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import orjson

from benchmarks.flows import REGISTRY
from benchmarks.ground import BATCH, Ground, Server, quiet
from millpond.cli.loop import run_loop
from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow
from millpond.engine.submit import submit


@dataclass
class Feeder:
    """A running feeder, and how much it was asked for and has done."""

    process: asyncio.subprocess.Process
    asked: int = 0
    fed: int = 0

    def feed(self, total: int) -> None:
        """Ask that `total` runs have been added since the start."""
        if total > self.asked:
            assert self.process.stdin is not None
            self.process.stdin.write(b"%d\n" % (total - self.asked))
            self.asked = total

    async def listen(self) -> None:
        """Count what is done until the feeder ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.fed += int(line)


@asynccontextmanager
async def feeder(urls: Urls, org_id: int, flow: Flow) -> AsyncIterator[Feeder]:
    """Run a feeder of a flow's runs for an org."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.feeder",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    made = Feeder(process)
    assert process.stdin is not None
    setup = {"urls": asdict(urls), "org_id": org_id, "flow": flow.name}
    process.stdin.write(orjson.dumps(setup) + b"\n")
    assert process.stdout is not None
    await process.stdout.readline()
    listening = asyncio.create_task(made.listen())
    try:
        yield made
    finally:
        process.stdin.close()
        await process.wait()
        await listening


async def serve() -> None:
    """Submit what is asked for until standard input closes."""
    setup = orjson.loads(await asyncio.to_thread(sys.stdin.readline))
    urls, org_id = Urls(**setup["urls"]), setup["org_id"]
    flow = REGISTRY.flows[setup["flow"], 1]
    db = await Database.connect(urls.app)
    engine_db = await EngineDatabase.connect(urls.engine, min_size=0)
    hints = await Hints.connect(urls.engine)
    at = Ground(Server(urls), db, engine_db)
    print(0, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        count = int(line)
        for start in range(0, count, BATCH):
            batch = [at.intent(flow, org_id) for _ in range(min(BATCH, count - start))]
            async with db.org(org_id) as con:
                await submit(con, batch)
            hints.wake([flow.queue])
        print(count, flush=True)
    await hints.close()
    await engine_db.close()
    await db.close()


if __name__ == "__main__":
    quiet()
    run_loop(serve())
