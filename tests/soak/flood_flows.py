"""Flows that call the stand-in, for workers of the real command line; what is called is counted there, not here."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import flow, step


async def post(port: int, call: dict[str, Any]) -> None:
    """Send one call and wait for its answer; what was sent last leaves at once."""
    body = orjson.dumps(call)
    head = f"POST /calls HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        if not (await reader.read()).startswith(b"HTTP/1.1 200 "):
            raise ConnectionError("the stand-in broke off")
    finally:
        writer.close()


@step("flood.call")
async def call(step: StepContext, port: int, keys: list[str], for_s: float) -> None:
    """Call the stand-in for the keys of a run, and each of them for its org."""
    org = f"org:{step.org_id}"
    named = [*keys, org, *(f"{org} x {key}" for key in keys)]
    await post(port, {"keys": named, "for_s": for_s})


async def _call(ctx: Context, data: dict[str, Any], *keys: str) -> None:
    await ctx.step(call, data["port"], list(keys), data["for_s"])


@flow("flood.ask", keys=["provider:one"])
async def ask(ctx: Context, data: dict[str, Any]) -> None:
    """Use the provider."""
    await _call(ctx, data, "provider:one")


@flow("flood.quick", keys=["model:fast"])
async def quick(ctx: Context, data: dict[str, Any]) -> None:
    """Use the model."""
    await _call(ctx, data, "model:fast")


@flow("flood.both", keys=["provider:one", "model:fast"])
async def both(ctx: Context, data: dict[str, Any]) -> None:
    """Use the model and the provider."""
    await _call(ctx, data, "provider:one", "model:fast")
