"""Flows that tell on which host they were executed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step

GATE, SEEN = Path("/tmp/gate"), Path("/tmp/seen")


@step("hosts.hold")
async def hold(step: StepContext) -> str:
    """Stay until this host's gate is open."""
    SEEN.touch()
    while not GATE.exists():
        await asyncio.sleep(0.02)
    return socket.gethostname()


@step("hosts.name")
async def name(step: StepContext, n: int) -> str:
    """Tell the host's name."""
    await asyncio.sleep(0.02)
    return socket.gethostname()


@flow("hosts.held", permission="runs:start")
async def held(ctx: Context, n: int) -> str:
    """Stay in a step."""
    return await ctx.step(hold)


@flow("hosts.quick", permission="runs:start")
async def quick(ctx: Context, n: int) -> list[str]:
    """Take two steps, with a sleep between them that holds no slot."""
    first = await ctx.step(name, n)
    await ctx.sleep(1.1)
    return [first, await ctx.step(name, n)]
