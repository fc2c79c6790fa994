"""Flows that the tests of the command line run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step
from millpond.engine.triggers import EventInput
from millpond.errors import Permanent


class Word(BaseModel):
    """What is said."""

    word: str = "hello"


class Verdict(BaseModel):
    """A human's yes or no."""

    is_right: bool


@step("sample.shout")
async def shout(step: StepContext, word: str) -> str:
    """Make a word loud."""
    return word.upper()


@step("sample.refuse")
async def refuse(step: StepContext) -> str:
    """Fail for good."""
    raise Permanent("the sample refuses", code="sample_refusal")


@step("sample.reverse", runs_in="process")
def reverse(step: StepContext, word: str) -> str:
    """Turn a word around, in a process of its own."""
    return word[::-1]


@step("sample.count", queue="sql")
def count(step: StepContext, word: Word) -> int:
    """Count letters, in another queue."""
    return len(word.word)


@flow("sample.elsewhere", permission="runs:start")
async def elsewhere(ctx: Context, word: Word) -> dict[str, Any]:
    """Let steps execute where they are told to."""
    return {"back": await ctx.step(reverse, word.word), "count": await ctx.step(count, word)}


@flow("sample.shout", permission="runs:start")
async def loud(ctx: Context, word: Word) -> Word:
    """Shout a word."""
    return Word(word=await ctx.step(shout, word.word))


@flow("sample.fail", permission="runs:start")
async def fail(ctx: Context, word: Word) -> str:
    """Fail."""
    return await ctx.step(refuse)


@flow("sample.wait", permission="runs:start")
async def wait(ctx: Context, word: Word) -> Word:
    """Wait for a long time."""
    await ctx.sleep(3600.0, name="long")
    return word


@flow("sample.ask", permission="runs:start")
async def ask(ctx: Context, word: Word) -> dict[str, Any]:
    """Ask whether a word is right."""
    decision = await ctx.ask_human(
        "right", role="support", form=Verdict, proposal={"word": word.word}, title="Is it right?"
    )
    return {"is_right": decision.answer.is_right, "by": decision.resolved_by}


@flow("sample.hear", permission="runs:start")
async def hear(ctx: Context, given: EventInput[Word]) -> Word:
    """Say what an event said."""
    return given.event.data


@flow("sample.listen", permission="runs:start")
async def listen(ctx: Context, word: Word) -> Any:
    """Wait to be told something."""
    await ctx.set_state("ear", "open")
    return (await ctx.wait_event("word")).data


@step("sample.open")
async def open_secret(step: StepContext, name: str) -> str:
    """Tell how long a secret is."""
    value = await step.secret(name)
    return f"{value} of {len(value)} characters"


@flow("sample.secret", permission="runs:start")
async def secret(ctx: Context, given: Word) -> str:
    """Open a secret."""
    return await ctx.step(open_secret, given.word)
