"""A worker in a process of its own, for tests that kill or stop it.

Reads one JSON line {engine, lease_s, slots} on standard input; SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context, StepContext
from millpond.engine.registry import Registry, flow, step
from millpond.engine.worker import Worker

REGISTRY = Registry()


@flow("tests.long", registry=REGISTRY)
async def long(ctx: Context, data: dict[str, Any]) -> list[int]:
    """Record one step, then stay in the second until a file appears."""
    first = await ctx.step("first", _append, data["log"], "first")
    second = await ctx.step("second", _hold, data["log"], data["gate"])
    return [first, second]


@flow("tests.blocking", registry=REGISTRY)
async def blocking(ctx: Context, data: dict[str, Any]) -> bool:
    """Block the event loop with a catastrophic regular expression for some seconds."""
    return await ctx.step("match", _match, data["log"], data["seconds"])


@step("tests.hold", queue="sql", registry=REGISTRY)
async def hold(step: StepContext, log: str, gate: str) -> int:
    """Stay until a file appears."""
    return await _hold(log, gate)


@step("tests.hold_thread", registry=REGISTRY)
def hold_thread(step: StepContext, log: str, gate: str) -> int:
    """Stay in a thread until a file appears."""
    with open(log, "a") as file:
        file.write("thread\n")
    while not Path(gate).exists():
        time.sleep(0.02)
    return 3


@flow("tests.elsewhere", registry=REGISTRY)
async def elsewhere(ctx: Context, data: dict[str, Any]) -> list[int]:
    """Record one step here, then one in another queue."""
    first = await ctx.step("first", _append, data["log"], "first")
    return [first, await ctx.step(hold, data["log"], data["gate"])]


@flow("tests.threaded", registry=REGISTRY)
async def threaded(ctx: Context, data: dict[str, Any]) -> int:
    """Stay in a thread."""
    return await ctx.step(hold_thread, data["log"], data["gate"])


async def _append(path: str, word: str) -> int:
    with open(path, "a") as file:
        file.write(word + "\n")
    return len(word)


async def _hold(path: str, gate: str) -> int:
    await _append(path, "second")
    while not Path(gate).exists():
        await asyncio.sleep(0.02)
    return 2


async def _match(path: str, seconds: float) -> bool:
    await _append(path, "match")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        re.match(r"(a+)+$", "a" * 22 + "b")
    return True


async def main() -> None:
    """Work until SIGTERM."""
    orders = orjson.loads(sys.stdin.readline())
    database = await EngineDatabase.connect(orders["engine"])
    worker = Worker(
        database=database,
        engine_url=orders["engine"],
        listen_url=orders["engine"],
        flows=list(REGISTRY.flows.values()),
        steps=list(REGISTRY.steps.values()),
        slots=orders.get("slots", {"default": 10}),
        lease_s=orders["lease_s"],
        drain_s=2.0,
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
