"""Flows that declare limits, for the tests of `millpond up`."""

from __future__ import annotations

from typing import Any

from millpond.engine.context import Context
from millpond.engine.declared import Limit
from millpond.engine.registry import flow

PROVIDER = Limit("provider:openai", concurrency=20, rate=600, burst=10)


@flow(
    "limited.answer",
    permission="runs:start",
    keys=["provider:openai"],
    limits=[Limit("flow:limited.answer", concurrency=5), PROVIDER],
)
async def answer(ctx: Context, _: Any) -> str:
    """Answer."""
    return "yes"


@flow("limited.route", keys=["provider:openai"], limits=[PROVIDER])
async def route(ctx: Context, _: Any) -> str:
    """Say where to."""
    return "there"
