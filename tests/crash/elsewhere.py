"""Flows with steps in another queue: what is sent, tried again later, drained, and left by its run.

Registered beside those of flows.py. Invariant: such a step tells the sink of its execution instead of the
attempt of its run, so that the oracle can count executions against claims.
"""

from __future__ import annotations

import asyncio

from tests.crash.flows import PARKS_S, QUICK, REGISTRY, effect_of, take
from tests.crash.sink import SinkClient

from millpond.engine.context import Context, StepContext
from millpond.engine.payloads import INLINE_BYTES
from millpond.engine.registry import flow, step
from millpond.errors import Transient

QUEUE = "sql"
# More than a row holds itself, so that it stands in a row of its own.
BIG = "x" * (INLINE_BYTES + 1)


async def far_effect_of(step_ctx: StepContext, effect: str) -> int:
    """Take an effect, telling which execution of the step takes it."""
    task = asyncio.current_task()
    assert task is not None
    return await effect_of(step_ctx, 0, effect, execution=task.get_name())


@step("crash.far", retry=QUICK, queue=QUEUE, registry=REGISTRY)
async def far(step_ctx: StepContext, effect: str, data: str = "") -> str:
    """Take one effect and give back what was given."""
    await far_effect_of(step_ctx, effect)
    return data or effect


@step("crash.far_flaky", retry=QUICK, queue=QUEUE, registry=REGISTRY)
async def far_flaky(step_ctx: StepContext, effect: str) -> str:
    """Take an effect, fail the first time at once and the second time for longer than a slot is held."""
    await far_effect_of(step_ctx, effect)
    if step_ctx.try_number <= 2:
        raise Transient("not yet", retry_after_s=PARKS_S if step_ctx.try_number == 2 else None)
    return effect


@step("crash.far_hold", retry=QUICK, queue=QUEUE, registry=REGISTRY)
async def far_hold(step_ctx: StepContext, effect: str) -> str:
    """Take an effect, then wait for the gate."""
    await far_effect_of(step_ctx, effect)
    await step_ctx.get(SinkClient).wait()
    return effect


@flow("crash.elsewhere", registry=REGISTRY)
async def elsewhere(ctx: Context, _: None) -> list[str]:
    """Take steps here and elsewhere, in a row and side by side; one is given much and gives it back."""
    first = await take(ctx, "first")
    names = await ctx.parallel(
        ctx.step(far, "left"),
        ctx.step(far, "right"),
        take(ctx, "here"),
        ctx.step(far_flaky, "late"),
    )
    given = await ctx.step(far, "big", BIG)
    return [first, *names, str(len(given)), await take(ctx, "last")]


@flow("crash.abandons", registry=REGISTRY)
async def abandons(ctx: Context, _: None) -> list[str]:
    """Stay in a step elsewhere until the gate opens, or until the run is cancelled or its worker drained."""
    return [await ctx.step(far_hold, "held far")]
