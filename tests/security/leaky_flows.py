"""Flows that do everything wrong that a flow can do with a secret: they put it wherever they can."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import Any
from urllib.parse import quote

import structlog

from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.registry import flow, step
from millpond.errors import InvalidInput, Permanent
from millpond.models.steps import complete

_log = structlog.get_logger("leaky")


def leaks(value: str) -> dict[str, Any]:
    """Return a value in the forms in which it gets about."""
    coded = base64.b64encode(f"user:{value}".encode()).decode()
    return {
        "plain": f"Bearer {value}!",
        value: "as a name",
        "url": f"https://x.example/?key={quote(value, safe='')}",
        "basic": f"Basic {coded}",
        "json": json.dumps({"key": value}),
        "twice": json.dumps(json.dumps([value])),
    }


@step("leaky.return")
async def give_away(step: StepContext) -> Any:
    """Return it, emit it, log it."""
    value = await step.secret("canary")
    await step.emit("leak", leaks(value))
    stream = step.veiled()
    text = f"it is {value}, it is"
    for at in range(0, len(text), 5):
        await step.emit("delta", {"text": stream.feed(text[at : at + 5])})
    await step.emit("delta", {"text": stream.end()})
    _log.warning("leaky.step", leak=leaks(value), text=f"with {value}")
    logging.getLogger("someones.library").error("GET /?key=%s", quote(value, safe=""))
    try:
        raise ValueError(value)
    except ValueError:
        _log.exception("leaky.failed")
    return leaks(value)


@step("leaky.elsewhere", queue="index")
async def elsewhere(step: StepContext, given: str) -> Any:
    """Return it from another queue."""
    return [given, leaks(await step.secret("canary"))]


@step("leaky.fail")
async def fail(step: StepContext) -> None:
    """Fail with it."""
    value = await step.secret("canary")
    raise Permanent(f"401: {leaks(value)}", code="refused", advice=f"not {value}")


@step("leaky.thread")
def in_thread(step: StepContext) -> Any:
    """Give it away from a thread."""
    value = step.secret_in_thread("canary")
    step.emit_soon("thread", leaks(value))
    _log.warning("leaky.thread", leak=leaks(value))
    return leaks(value)


@flow("leaky.child", permission="runs:start")
async def child(ctx: Context, given: Any) -> Any:
    """Return what it was given."""
    return given


@flow("leaky.all", permission="runs:start")
async def give_all_away(ctx: Context, given: Any) -> Any:
    """Put it everywhere, over several attempts."""
    value = await ctx.secret("canary")
    await ctx.set_state("shown", leaks(value))
    await ctx.emit("leak", leaks(value))
    told = [await ctx.step(give_away), await ctx.step(in_thread)]
    try:
        await ctx.step(elsewhere, value)
    except InvalidInput as error:
        told.append(f"{error}: {error.advice}")
    told.append(await ctx.step(elsewhere, "nothing"))
    told.append(await ctx.run_flow(child, leaks(value), labels={"key": value}))
    try:
        await ctx.step(fail)
    except StepFailed as error:
        told.append(str(error))
    await ctx.ask_human(
        "ok",
        role="support",
        form={},
        title=value,
        proposal=leaks(value),
        expires_in_s=0.1,
        default={},
    )
    await ctx.sleep(1.1)
    return [told, leaks(value)]


@flow("leaky.failing", permission="runs:start")
async def failing(ctx: Context, _: Any) -> None:
    """Fail with it outside of a step."""
    value = await ctx.secret("canary")
    await asyncio.sleep(0)
    raise Permanent(f"no: {value} {quote(value, safe='')}", code="no")


@flow("leaky.model", permission="runs:start")
async def ask_model(ctx: Context, _: Any) -> Any:
    """Ask a model whose provider sends back what it was sent."""
    return await ctx.step(complete, "hello")
