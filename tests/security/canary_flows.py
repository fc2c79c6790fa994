"""Flows through which marked data of an org goes everywhere that data of a run can go."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step
from millpond.engine.triggers import EventInput
from millpond.errors import Permanent


class Words(BaseModel):
    """Words of one org, each for one place."""

    given: str
    progress: str = ""
    state: str = ""
    output: str = ""
    delta: str = ""


class Note(BaseModel):
    """What a human says."""

    text: str


@step("canary.make")
async def make(step: StepContext, words: Words) -> dict[str, str]:
    """Show a word while it works, and give one back."""
    await step.emit("step", {"word": words.delta})
    return {"output": words.output}


@step("canary.count", queue="sql")
def count(step: StepContext, words: Words) -> int:
    """Count letters, in another queue."""
    return len(words.given)


@step("canary.break")
async def break_(step: StepContext, words: Words) -> None:
    """Fail with a word in the error."""
    raise Permanent(f"{words.given} cannot be done", code="canary", advice=f"ask {words.output}")


@step("canary.crash")
async def crash(step: StepContext, words: Words) -> None:
    """Fail in a way that nobody foresaw, with a word in the error."""
    raise RuntimeError(f"{words.given} was not foreseen")


@flow("canary.work", permission="runs:start")
async def work(ctx: Context, words: Words) -> dict[str, Any]:
    """Leave words in the input, events, state values, steps, a step elsewhere, and the output."""
    await ctx.emit("progress", {"word": words.progress})
    await ctx.set_state("word", words.state)
    await ctx.step(count, words)
    return await ctx.step(make, words)


@flow("canary.fail", permission="runs:start")
async def fail(ctx: Context, words: Words) -> None:
    """Fail."""
    await ctx.step(break_, words)


@flow("canary.explode", permission="runs:start")
async def explode(ctx: Context, words: Words) -> None:
    """Fail without meaning to."""
    await ctx.step(crash, words)


@flow("canary.ask", permission="runs:start")
async def ask(ctx: Context, words: Words) -> dict[str, Any]:
    """Ask somebody about a word."""
    decision = await ctx.ask_human(
        "approve", role="support", form=Note, proposal={"word": words.progress}, title=words.state
    )
    return {"said": decision.answer.text}


@flow("canary.listen", permission="runs:start")
async def listen(ctx: Context, words: Words) -> Any:
    """Wait to be told something."""
    return (await ctx.wait_event(words.progress)).data


@flow("canary.hear", permission="runs:start")
async def hear(ctx: Context, given: EventInput[Words]) -> dict[str, str]:
    """Give back what an event said."""
    return {"heard": given.event.data.output}
