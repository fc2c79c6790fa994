"""A worker process for the soak test: `python worker_process.py`, addresses in the environment."""

from __future__ import annotations

import asyncio
import os
import random

from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context
from millpond.engine.registry import Registry, flow
from millpond.engine.worker import Worker

REGISTRY = Registry()


async def think(seconds: float) -> float:
    """Take a moment, as a call to a model does."""
    await asyncio.sleep(seconds)
    return seconds


@flow("soak.walk", registry=REGISTRY)
async def walk(ctx: Context, number: int) -> int:
    """Take steps in a row, side by side, and over a wait."""
    await ctx.step("first", think, random.uniform(0.0, 0.2))
    await ctx.parallel(
        ctx.step("left", think, random.uniform(0.0, 0.4)),
        ctx.step("right", think, random.uniform(0.0, 0.4)),
    )
    if number % 5 == 0:
        await ctx.sleep(1.5)
    await ctx.step("last", think, 0.01)
    return number


async def main() -> None:
    """Work until killed."""
    url = os.environ["SOAK_ENGINE_URL"]
    database = await EngineDatabase.connect(url)
    worker = Worker(
        database=database,
        engine_url=url,
        listen_url=url,
        flows=REGISTRY.select([]),
        slots={"default": 30},
        lease_s=3.0,
    )
    await worker.run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main())
