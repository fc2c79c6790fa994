"""A worker in a process of its own whose runs are seen at a sink: each holds a connection while it executes.

How it is started and ended: working.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.engine.working import work

from millpond.engine.context import Context
from millpond.engine.registry import Registry, flow

REGISTRY = Registry()


@flow("tests.limited", keys=["provider:sink"], registry=REGISTRY)
async def limited(_ctx: Context, data: dict[str, Any]) -> None:
    """Hold a connection to the sink for a while."""
    await call(data)


@flow("tests.limited_steps", registry=REGISTRY)
async def limited_steps(ctx: Context, data: dict[str, Any]) -> None:
    """Do so in three steps that have the key, two of them side by side."""
    keys = ["provider:sink"]
    await ctx.parallel(
        ctx.step("call", call, data, keys=keys), ctx.step("call other", call, data, keys=keys)
    )
    await ctx.step("call last", call, data, keys=keys)


@flow("tests.limited_beside", registry=REGISTRY)
async def limited_beside(ctx: Context, data: dict[str, Any]) -> None:
    """Do so in a step that has the key, beside one that works until a door is opened."""
    await ctx.parallel(
        ctx.step("work", stay, data), ctx.step("call", call, data, keys=["provider:sink"])
    )


async def stay(data: dict[str, Any]) -> None:
    """Stand before the door."""
    reader, writer = await asyncio.open_connection("127.0.0.1", data["door"])
    try:
        await reader.read()
    finally:
        writer.close()


async def call(data: dict[str, Any]) -> None:
    """Hold one connection, and say who it is."""
    _, writer = await asyncio.open_connection("127.0.0.1", data["port"])
    try:
        writer.write(data.get("name", "").encode())
        await asyncio.sleep(data["for_s"])
    finally:
        writer.close()


if __name__ == "__main__":
    asyncio.run(work(REGISTRY, "tests.engine.limited_process"))
