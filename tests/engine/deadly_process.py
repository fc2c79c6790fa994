"""A worker whose flows take its process down, for tests of quarantine.

Takes one JSON argument {engine, lease_s, alone}; SIGTERM drains. Beside it such a process starts others
for what is executed alone.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context
from millpond.engine.registry import Registry, flow
from millpond.engine.worker import Worker

REGISTRY = Registry()
MEMORY_BYTES = 3 * 2**30


@flow("tests.deadly", registry=REGISTRY)
async def deadly(ctx: Context, data: dict[str, Any]) -> int:
    """Kill the own process in so many attempts, when all neighbours have begun."""
    await ctx.step("before", _note, data["folder"], "before")
    return await ctx.step("die", _die, data)


@flow("tests.weary", registry=REGISTRY)
async def weary(ctx: Context, data: dict[str, Any]) -> int:
    """Kill the own process in so many attempts, sleep, and tell in which process it woke."""
    await ctx.step("before", _note, data["folder"], "before")
    await ctx.step("die", _die, data)
    await ctx.sleep(1.1)
    return await ctx.step("work", _work, data)


@flow("tests.hungry", registry=REGISTRY)
async def hungry(ctx: Context, data: dict[str, Any]) -> int:
    """Eat memory until the process is killed for it."""
    return await ctx.step("eat", _eat)


@flow("tests.neighbour", registry=REGISTRY)
async def neighbour(ctx: Context, data: dict[str, Any]) -> int:
    """Work for a while, and note in which process."""
    return await ctx.step("work", _work, data)


async def _note(folder: str, word: str) -> None:
    with (Path(folder) / "log").open("a") as file:
        file.write(f"{word} {os.getpid()}\n")


async def _die(data: dict[str, Any]) -> int:
    await _note(data["folder"], "deadly")
    deaths = len([one for one in _lines(data["folder"]) if one.startswith("deadly")])
    if deaths > data["lives"]:
        return deaths
    if deaths == 1:
        while len(_lines(data["folder"])) < 2 + data["neighbours"]:
            await asyncio.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _lines(folder: str) -> list[str]:
    return (Path(folder) / "log").read_text().splitlines()


async def _eat() -> int:
    """Take memory up to a limit, where the kernel would kill."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    eaten: list[bytearray] = []
    try:
        while True:
            eaten.append(bytearray(2**30))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(eaten)


async def _work(data: dict[str, Any]) -> int:
    await _note(data["folder"], "neighbour")
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        await asyncio.sleep(0.02)
    return os.getpid()


async def main(argument: str) -> int:
    """Work until SIGTERM; alone, until one work item is done."""
    orders = orjson.loads(argument)
    alone = orjson.dumps({**orders, "alone": True}).decode()
    database = await EngineDatabase.connect(orders["engine"])
    worker = Worker(
        database=database,
        engine_url=orders["engine"],
        listen_url=orders["engine"],
        flows=list(REGISTRY.flows.values()),
        slots={"default": 10},
        lease_s=orders["lease_s"],
        drain_s=2.0,
        alone=orders.get("alone", False),
        alone_command=[sys.executable, "-m", "tests.engine.deadly_process", alone],
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()
    return 0 if worker.has_worked or not orders.get("alone") else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(sys.argv[1])))
