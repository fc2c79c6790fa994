"""Labels of workers and what flows and steps need: work goes only where its needs are met."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine.context import Context, StepContext
from millpond.engine.registry import meets


def test_needs_are_met_by_equal_labels() -> None:
    assert meets({}, {})
    assert meets({"gpu": "true", "zone": "a"}, {"gpu": "true"})
    assert not meets({"gpu": "false"}, {"gpu": "true"})
    assert not meets({}, {"gpu": "true"})


async def _known(pond: Pond, workers: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await pond.count("worker") < workers:
            await asyncio.sleep(0.02)


async def test_a_flow_is_run_only_where_its_needs_are_met_and_published_everywhere(
    pond: Pond,
) -> None:
    async def train(ctx: Context, n: int) -> int:
        return n + 1

    async def plain(ctx: Context, n: int) -> int:
        return n

    needy, other = pond.flow(train, needs={"gpu": "true"}), pond.flow(plain)
    async with pond.worker(labels={"gpu": "false"}):
        run_id = await pond.submit(needy, 1)
        assert (await pond.ended(await pond.submit(other, 5)))["output"] == 5
        # Claimed in between, the needy one would have begun before.
        assert (await pond.run_row(run_id))["started_at"] is None
        assert await pond.count("flow_version", "labels->>'gpu' = 'true'") == 1
        assert await pond.count("worker", "'train@1' = any(capabilities)") == 0
        async with pond.worker(labels={"gpu": "true", "zone": "a"}):
            row = await pond.ended(run_id)
            assert await pond.count("worker", "labels->>'zone' = 'a'") == 1
    assert row["output"] == 2


async def test_a_step_goes_to_a_worker_that_meets_its_needs_in_the_runs_own_queue(
    pond: Pond,
) -> None:
    where: list[Any] = []

    async def embed(step: StepContext, n: int) -> int:
        where.append(step.get(str))
        return n * 10

    step = pond.step(embed, needs={"gpu": "true"})

    async def use(ctx: Context, n: int) -> int:
        return await ctx.step(step, n)

    flow = pond.flow(use)
    async with pond.worker(resources={str: "plain"}):
        run_id = await pond.submit(flow, 2)
        await pond.until(run_id, "run.waiting")
        async with pond.worker(flows=[], labels={"gpu": "true"}, resources={str: "with a GPU"}):
            await _known(pond, 2)
            assert (await pond.ended(run_id))["output"] == 20
    queued = [e.data for e in await pond.events(run_id) if e.kind == "step.queued"]
    assert queued == [{"name": "embed", "queue": "default"}]
    async with pond.worker(labels={"gpu": "true"}, resources={str: "all in one"}):
        again = await pond.submit(flow, 3)
        assert (await pond.ended(again))["output"] == 30
        assert "step.queued" not in await pond.kinds(again)
    assert where == ["with a GPU", "all in one"]
