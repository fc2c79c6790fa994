"""Flows of patterns over several runs, people and outcomes: the other half of the crash workload.

Registered beside those of flows.py. Invariant: an effect that is declared `once` reaches the sink once.
"""

from __future__ import annotations

from typing import Any

from tests.crash.flows import PARKS_S, QUICK, REGISTRY, effect_of, steps, take, touch

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step
from millpond.errors import Permanent

SIGNAL = "go"


@step("crash.once", retry=QUICK, effect="once", registry=REGISTRY)
async def once(step_ctx: StepContext, attempt: int, effect: str) -> int:
    """Take an effect, then end in an error that leaves open whether it was taken."""
    await effect_of(step_ctx, attempt, effect, is_once=True)
    raise RuntimeError("the line went dead")


@step("crash.undo", retry=QUICK, registry=REGISTRY)
async def undo(step_ctx: StepContext, number: int) -> int:
    """Take the opposite effect."""
    return await effect_of(step_ctx, 0, f"undo of {number}")


@step("crash.other", retry=QUICK, registry=REGISTRY)
async def other(step_ctx: StepContext) -> int:
    """Be what the recorded history does not have; never performed."""
    return await effect_of(step_ctx, 0, "other")


@flow("crash.doubts", registry=REGISTRY)
async def doubts(ctx: Context, _: None) -> list[str]:
    """Take an effect that must not be repeated, and let a person find out about it."""
    await ctx.step(once, ctx.attempt, "once")
    return ["once", await take(ctx, "after")]


@flow("crash.undone", registry=REGISTRY)
async def undone(ctx: Context, _: None) -> list[str]:
    """Take a step, then fail, so that it is undone."""
    await ctx.step(touch, ctx.attempt, "done", undo=undo)
    raise Permanent("the rest cannot be done")


@flow("crash.hears", registry=REGISTRY)
async def hears(ctx: Context, _: None) -> list[str]:
    """Wait for a signal between steps."""
    before = await take(ctx, "before")
    heard = await ctx.wait_event(SIGNAL)
    return [before, str(heard.data), await take(ctx, "later")]


@flow("crash.dozes", registry=REGISTRY)
async def dozes(ctx: Context, _: None) -> list[str]:
    """Sleep until cancelled."""
    await ctx.sleep(86_400)
    return ["dozed"]


@flow("crash.parent", registry=REGISTRY)
async def parent(ctx: Context, _: None) -> list[str]:
    """Start two children, await one, and leave the other to be cancelled."""
    await ctx.start(dozes)
    child = await ctx.start(steps)
    mine = await take(ctx, "meanwhile")
    return [mine, *await ctx.join(child)]


@flow("crash.continues", registry=REGISTRY)
async def continues(ctx: Context, turn: int) -> list[str]:
    """Take a step and go on as another run, twice."""
    mine = await take(ctx, f"turn {turn}")
    if turn < 2:
        await ctx.continue_as(turn + 1)
    return [mine]


@flow("crash.changed", registry=REGISTRY)
async def changed(ctx: Context, _: None) -> list[str]:
    """Ask for another step than was recorded in the second attempt, as changed code does."""
    if ctx.attempt == 2 and ctx._history:
        await ctx.step(other)
    mine = await take(ctx, "first")
    await ctx.sleep(PARKS_S)
    return [mine, await take(ctx, "second")]


@flow("crash.takes", registry=REGISTRY)
async def takes(ctx: Context, _: Any) -> list[str]:
    """Take one step, whatever the input: for schedules and triggers."""
    return [await take(ctx, "one")]
