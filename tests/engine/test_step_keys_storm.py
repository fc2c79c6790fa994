"""Runs of many shapes whose steps need keys, on two small workers: no limit is passed, all end, and nothing is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, suppress
from random import Random
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.test_limits import limit, over
from tests.engine.test_step_keys import nothing_left

from millpond.engine.context import Context
from millpond.engine.operations import cancel
from millpond.errors import Conflict, Transient
from millpond.retry import Retry

MAXIMA = {"provider:a": 2, "provider:b": 1, "model:c": 3}
RUNS = 50
QUICK = Retry(max_tries=50, base_s=0.01, cap_s=0.02)


class Calls:
    """What steps do: they are counted by key, last a while, and some fail at first."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    async def call(self, keys: list[str], for_s: float, is_flaky: bool) -> None:
        for key in keys:
            self.now[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
        try:
            await asyncio.sleep(for_s)
            if is_flaky and self.random.random() < 0.3:
                raise Transient("again", retry_after_s=self.random.choice([0.0, 0.2, 1.2]))
        finally:
            self.now.subtract(keys)

    def plan(self) -> list[Any]:
        """Make the steps of one branch; one without keys and time sleeps."""
        steps: list[Any] = []
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.random()
            keys = self.random.sample(sorted(MAXIMA), self.random.randint(1, 2))
            for_s = self.random.choice([0.0, 0.02, 0.05])
            steps.append([[], 0.0] if kind < 0.15 else [[], 0.02] if kind < 0.3 else [keys, for_s])
        return steps


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_limit_is_passed_and_nothing_is_left_behind(pond: Pond, seed: int) -> None:
    random = Random(seed)
    calls = Calls(random)

    async def branch(ctx: Context, nth: int, steps: list[Any]) -> None:
        for place, (keys, for_s) in enumerate(steps):
            name = f"{nth}-{place}"
            if not keys and not for_s:
                await ctx.sleep(1.1, name)
                continue
            flaky = nth == 0
            await ctx.step(name, calls.call, keys, for_s, flaky, keys=keys, retry=QUICK)

    async def storms(ctx: Context, data: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(data["for_s"]):
                await ctx.parallel(
                    *[branch(ctx, nth, one) for nth, one in enumerate(data["plans"])]
                )
        except TimeoutError:
            key = "provider:a"
            is_flaky = False
            await ctx.step("after", calls.call, [key], 0.01, is_flaky, keys=[key])

    flow = pond.flow(storms)
    for key, maximum in MAXIMA.items():
        await limit(pond.db, key, maximum)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(pond.worker({"default": 4}))
        ids = []
        for _ in range(RUNS):
            plans = [calls.plan() for _ in range(random.randint(1, 4))]
            data = {"for_s": random.choice([100.0, 100.0, 0.5]), "plans": plans}
            ids.append(await pond.submit(flow, data))
        for _ in range(8):
            await asyncio.sleep(0.2)
            async with pond.db.org(pond.org_id) as con:
                with suppress(Conflict):
                    await cancel(con, pond.org_id, random.choice(ids), "user:test")
        await over(pond, flow, RUNS, within_s=60)
        await nothing_left(pond)
    assert all(calls.most[key] <= maximum for key, maximum in MAXIMA.items()), calls.most
