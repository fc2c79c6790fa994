"""A worker in a process of its own whose runs ask a provider on a socket, which counts the tokens that it gives.

How it is started and ended: working.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.engine.working import work

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import Registry, flow, step

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


if __name__ == "__main__":
    asyncio.run(work(REGISTRY, "tests.engine.tokens_process"))
