"""What an attempt's flow was given is gone with it: no cycle waits for the garbage collector."""

from __future__ import annotations

import asyncio
import gc

from tests.engine.conftest import Pond

from millpond.engine.calling import Caller
from millpond.engine.context import Context


async def test_an_attempt_that_is_over_leaves_nothing_to_the_garbage_collector(pond: Pond) -> None:
    async def double(n: int) -> int:
        return n * 2

    async def steps(ctx: Context, n: int) -> int:
        return int(await ctx.step("second", double, await ctx.step("first", double, n)))

    flow = pond.flow(steps)
    async with pond.worker():
        gc.collect()
        gc.disable()
        try:
            for n in range(3):
                run_id = await pond.submit(flow, n)
                assert (await pond.ended(run_id))["output"] == n * 4

            async with asyncio.timeout(20):
                while any(issubclass(type(one), (Context, Caller)) for one in gc.get_objects()):
                    await asyncio.sleep(0.02)
        finally:
            gc.enable()
