"""Flows of which histories are kept in tests/golden/histories; a change here needs a new version."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.registry import Registry, flow, step
from millpond.errors import Permanent
from millpond.retry import NO_RETRY

REGISTRY = Registry()


class Order(BaseModel):
    """What is bought."""

    item: str
    cents: int


class Approval(BaseModel):
    """A human's word."""

    approved: bool


@step("golden.reserve", registry=REGISTRY)
async def reserve(step_ctx: StepContext, order: Order) -> Order:
    """Reserve an item."""
    return order


@step("golden.free", registry=REGISTRY)
async def free(step_ctx: StepContext, order: Order) -> None:
    """Undo a reservation."""


@step("golden.charge", effect="once", registry=REGISTRY)
async def charge(step_ctx: StepContext, cents: int) -> str:
    """Take money."""
    return f"receipt for {cents}"


@step("golden.refuse", retry=NO_RETRY, registry=REGISTRY)
async def refuse(step_ctx: StepContext) -> None:
    """Fail for good."""
    raise Permanent("refused", code="refused")


@flow("golden.order", registry=REGISTRY)
async def order(ctx: Context, wanted: Order) -> list[Any]:
    """Go through every kind of checkpoint: steps, branches, a failure, an event, a sleep, a question."""
    reserved = await ctx.step(reserve, wanted, undo=free)
    found = await ctx.parallel(_rated(ctx, 2), _rated(ctx, 3))
    try:
        await ctx.step(refuse)
    except StepFailed as failed:
        await ctx.emit("refused", {"code": failed.code})
    receipt = await ctx.step(charge, reserved.cents)
    await ctx.sleep(1.1, name="cool down")
    decision = await ctx.ask_human("approve", role="support", form=Approval)
    return [receipt, *found, decision.answer.approved]


async def _rated(ctx: Context, factor: int) -> int:
    total = 0
    for _ in range(2):
        total += await ctx.step("rate", _rate, factor)
    return total


async def _rate(factor: int) -> int:
    return 10 * factor
