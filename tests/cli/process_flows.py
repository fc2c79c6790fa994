"""Flows that tell of the processes that run them."""

from __future__ import annotations

import time
from pathlib import Path

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step


@step("process.hold")
def hold(step: StepContext, gate: str) -> str:
    """Stay in a thread until a file appears: nothing else ends it."""
    while not Path(gate).exists():
        time.sleep(0.02)
    return "held"


@step("process.stick", timeout_s=1.0)
async def stick(step: StepContext, seen: str) -> str:
    """Block the loop for minutes the first time."""
    if not Path(seen).exists():
        Path(seen).touch()
        time.sleep(300)
    return "came through"


@flow("process.stuck", permission="runs:start")
async def stuck(ctx: Context, seen: str) -> str:
    """Block the loop in a step of one second; the next attempt does not."""
    return await ctx.step(stick, seen)


@flow("process.threaded", permission="runs:start")
async def threaded(ctx: Context, gate: str) -> str:
    """Stay in a thread."""
    return await ctx.step(hold, gate)


@flow("process.needy", permission="runs:start", needs={"gpu": "true"})
async def needy(ctx: Context, gate: str) -> str:
    """Need a worker that has something."""
    return "had it"
