"""The sample flow `sample.wait` as somebody changed it: it asks for another step than was recorded."""

from __future__ import annotations

from typing import Any

from millpond.engine.context import Context
from millpond.engine.registry import flow


async def _loud(word: str) -> str:
    return word.upper()


@flow("sample.wait", permission="runs:start")
async def wait(ctx: Context, word: dict[str, Any]) -> str:
    """Shout instead of waiting."""
    return await ctx.step("shout", _loud, word.get("word", ""))
