"""A worker in a process of its own whose runs ask a provider on a socket, which counts the tokens that it gives.

Reads one JSON line {engine, lease_s, slots} on standard input; SIGTERM drains. Started with the address of the
database, it executes one suspect alone.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import orjson

from millpond.db.pool import EngineDatabase
from millpond.engine.context import Context, StepContext
from millpond.engine.registry import Registry, flow, step
from millpond.engine.worker import Worker

REGISTRY = Registry()
NEED = 100


async def _ask(step: StepContext, port: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        used = int(await reader.readline())
    finally:
        writer.close()
    step.spend("counter:m", input_tokens=used, output_tokens=0)
    return used


@step("tests.ask", registry=REGISTRY)
async def ask(step: StepContext, port: int) -> int:
    """Ask the provider, and tell what it says that this used."""
    return await _ask(step, port)


@step("tests.ask_keyed", keys=["provider:counter"], tokens=NEED, registry=REGISTRY)
async def ask_keyed(step: StepContext, port: int) -> int:
    """Do the same, under the step's own key."""
    return await _ask(step, port)


@flow("tests.asks", keys=["provider:counter"], tokens=NEED, registry=REGISTRY)
async def asks(ctx: Context, data: dict[str, Any]) -> int:
    """Ask once."""
    return await ctx.step(ask, data["port"])


@flow("tests.steps_ask", registry=REGISTRY)
async def steps_ask(ctx: Context, data: dict[str, Any]) -> int:
    """Ask in a step that has the key itself."""
    return await ctx.step(ask_keyed, data["port"])


async def main() -> None:
    """Work until SIGTERM."""
    is_alone = len(sys.argv) > 1
    orders = {"engine": sys.argv[-1], "lease_s": 2.0, "slots": 1}
    if not is_alone:
        orders = orjson.loads(sys.stdin.readline())
    database = await EngineDatabase.connect(orders["engine"])
    worker = Worker(
        database=database,
        engine_url=orders["engine"],
        listen_url=orders["engine"],
        flows=list(REGISTRY.flows.values()),
        steps=list(REGISTRY.steps.values()),
        slots={"default": orders["slots"]},
        lease_s=orders["lease_s"],
        drain_s=2.0,
        alone=is_alone,
        alone_command=[sys.executable, "-m", "tests.engine.tokens_process", orders["engine"]],
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
