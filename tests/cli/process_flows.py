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


@flow("process.threaded", permission="runs:start")
async def threaded(ctx: Context, gate: str) -> str:
    """Stay in a thread."""
    return await ctx.step(hold, gate)


@flow("process.needy", permission="runs:start", needs={"gpu": "true"})
async def needy(ctx: Context, gate: str) -> str:
    """Need a worker that has something."""
    return "had it"
