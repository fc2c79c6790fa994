"""The pooler ends and is started again under load: nothing is lost, nothing is recorded twice."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable

import pytest
from tests.engine.conftest import Pond
from tests.pooler import Pooler

from millpond.engine.context import Context
from millpond.errors import MillpondError

LOAD_S = 6.0
ENDS = 4


@pytest.mark.parametrize("way", [Pooler.kill, Pooler.end_in_order], ids=["killed", "in order"])
async def test_a_pooler_that_ends_under_load_loses_nothing(
    pond: Pond, before: Pooler, way: Callable[[Pooler], None]
) -> None:
    async def add(one: int, other: int) -> int:
        await asyncio.sleep(0.01)
        return one + other

    async def sums(ctx: Context, n: int) -> int:
        total = n
        for nth in range(3):
            total = await ctx.step("add", add, total, nth)
        await ctx.sleep(1.1)
        return await ctx.step("last", add, total, n)

    pond.flow(sums)
    accepted: dict[uuid.UUID, int] = {}

    async def load() -> None:
        until, n = time.monotonic() + LOAD_S, 0
        while time.monotonic() < until:
            n += 1
            with contextlib.suppress(MillpondError):  # nobody was told that this one is accepted
                accepted[await pond.submit("sums", n)] = n
            await asyncio.sleep(0.01)

    async with pond.worker({"default": 50}):
        loading = asyncio.create_task(load())
        for _ in range(ENDS):
            await asyncio.sleep(LOAD_S / (ENDS + 1))
            await asyncio.to_thread(way, before)
            await asyncio.to_thread(before.start)
        await loading
        for run_id, n in accepted.items():
            assert (await pond.ended(run_id))["output"] == 2 * n + 3
        async with asyncio.timeout(40):
            while await pond.count("item"):
                await asyncio.sleep(0.05)
    assert len(accepted) > LOAD_S
    # Those whose answer was lost are whole as well.
    assert await pond.count("run", "outcome is distinct from 'succeeded'") == 0
    assert await pond.count("step") == 5 * await pond.count("run")
    assert await pond.count("event", "kind = 'run.succeeded'") == await pond.count("run")
    assert await pond.count("lease") == 0
