"""A worker in a process of its own, for tests that kill or stop it.

Reads one JSON line {engine, lease_s, slots, silent_s} on standard input; SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context, StepContext
from millpond.engine.endgame import Failure
from millpond.engine.heartbeat import SILENT_S
from millpond.engine.registry import Registry, flow, step
from millpond.engine.worker import Worker
from millpond.errors import Permanent

REGISTRY = Registry()


@flow("tests.long", registry=REGISTRY)
async def long(ctx: Context, data: dict[str, Any]) -> list[int]:
    """Record one step, then stay in the second until a file appears."""
    first = await ctx.step("first", _append, data["log"], "first")
    second = await ctx.step("second", _hold, data["log"], data["gate"])
    return [first, second]


@flow("tests.blocking", registry=REGISTRY)
async def blocking(ctx: Context, data: dict[str, Any]) -> bool:
    """Block the loop, and hold the interpreter, in one catastrophic regular expression."""
    return await ctx.step("match", _match, data["log"], data["seconds"])


@flow("tests.stuck", registry=REGISTRY)
async def stuck(ctx: Context, data: dict[str, Any]) -> bool:
    """Block the loop for minutes in a step of one second; the next attempt does not."""
    return await ctx.step("match", _match_once, data["log"], timeout_s=1.0)


@flow("tests.woken", registry=REGISTRY)
async def woken(ctx: Context, data: dict[str, Any]) -> list[Any]:
    """Sleep and record a step in one branch, while the other stays until a file appears."""

    async def late() -> int:
        await ctx.sleep(1.1)
        return await ctx.step("late", _append, data["log"], "late")

    held = ctx.step("held", _hold, data["log"], data["gate"])
    return list(await ctx.parallel(late(), held))


@step("tests.charge", effect="once", registry=REGISTRY)
async def charge(step_ctx: StepContext, log: str, gate: str) -> int:
    """Stay until a file appears: an effect that must not be repeated."""
    return await _hold(log, gate)


@flow("tests.once", registry=REGISTRY)
async def once(ctx: Context, data: dict[str, Any]) -> int:
    """Have one effect."""
    return await ctx.step(charge, data["log"], data["gate"])


@step("tests.undo", registry=REGISTRY)
async def undo(step_ctx: StepContext, booked: dict[str, str]) -> None:
    """Undo a booking; of `a` it takes until a file appears."""
    if booked["what"] == "a":
        await _hold(booked["log"], booked["gate"])
    await _append(booked["log"], f"un-{booked['what']}")


async def _sorry(ctx: Context, data: dict[str, Any], failure: Failure) -> None:
    await ctx.step("sorry", _append, data["log"], "sorry")


@flow("tests.undone", on_failure=_sorry, registry=REGISTRY)
async def undone(ctx: Context, data: dict[str, Any]) -> None:
    """Book two things and fail."""
    for what in ("a", "b"):
        await ctx.step("book", _book, {**data, "what": what}, undo=undo)
    await ctx.step("refuse", _refuse)


async def _book(booking: dict[str, str]) -> dict[str, str]:
    await _append(booking["log"], booking["what"])
    return booking


async def _refuse() -> None:
    raise Permanent("the card was refused", code="refused")


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
    """Match once for at least `seconds`: each further letter doubles the time, measured on short ones."""
    await _append(path, "match")
    took_s, letters = 0.0, 14
    while took_s < 0.01:
        letters += 1
        began = time.perf_counter()
        re.match(r"(a+)+$", "a" * letters + "b")
        took_s = time.perf_counter() - began
    letters += math.ceil(math.log2(seconds / took_s))
    return re.match(r"(a+)+$", "a" * letters + "b") is None


async def _match_once(path: str) -> bool:
    return Path(path).exists() or await _match(path, 300.0)


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
        silent_s=orders.get("silent_s", SILENT_S),
        drain_s=2.0,
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
