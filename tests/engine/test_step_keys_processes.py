"""Steps that need keys over three worker processes, some of them killed: their tries are counted at a sink."""

from __future__ import annotations

import asyncio

from tests.engine.conftest import Pond
from tests.engine.limited_process import limited, limited_steps
from tests.engine.test_limits import limit, over
from tests.engine.test_limits_processes import Sink, kill_one, listening, three


async def submit_steps(pond: Pond, sink: Sink, count: int, for_s: float) -> None:
    """Submit runs whose steps hold a connection to the sink."""
    for _ in range(count):
        await pond.submit(limited_steps, {"port": sink.port, "for_s": for_s})


async def nothing_left(pond: Pond) -> None:
    async with asyncio.timeout(30):
        for table in ("step_lease", "step_need", "ready", "lease"):
            while await pond.count(table):
                await asyncio.sleep(0.05)


async def test_tries_never_pass_the_limit_over_processes_that_are_killed_and_edits(
    pond: Pond,
) -> None:
    async with listening() as sink:
        await limit(pond.db, "provider:sink", 4)
        await submit_steps(pond, sink, 40, 0.06)
        for _ in range(20):
            await pond.submit(limited, {"port": sink.port, "for_s": 0.06})
        async with three(pond) as processes:
            for nth in (0, 1, 2):
                await asyncio.sleep(0.7)
                await sink.busy()
                await kill_one(pond, processes, nth)
            assert sink.most == 4
            await limit(pond.db, "provider:sink", 6)
            await over(pond, limited, 20, within_s=60)
            await over(pond, limited_steps, 40, within_s=60)
            assert sink.most <= 6
            await nothing_left(pond)


async def test_the_room_of_a_killed_workers_tries_is_free_after_its_rescue(pond: Pond) -> None:
    async with listening() as sink:
        await limit(pond.db, "provider:sink", 2)
        async with three(pond) as processes:
            await submit_steps(pond, sink, 2, 600.0)
            async with asyncio.timeout(20):
                while sink.now < 2:
                    await asyncio.sleep(0.02)
            for nth in (0, 1, 2):
                await kill_one(pond, processes, nth)
            async with asyncio.timeout(20):
                while sink.now < 2:
                    await asyncio.sleep(0.02)
            assert sink.most == 2
            for process in processes:
                process.kill()


async def test_a_rate_of_tries_holds_over_processes_at_whoever_is_called(pond: Pond) -> None:
    rate, burst = 40, 4
    async with listening() as sink:
        await limit(pond.db, "provider:sink", rate, kind="rate", period_s=1.0, burst=burst)
        async with three(pond) as processes:
            await submit_steps(pond, sink, 30, 0.01)
            await asyncio.sleep(1.0)
            await kill_one(pond, processes, 0)
            await over(pond, limited_steps, 30, within_s=60)
            await nothing_left(pond)
    opened = sorted(sink.opened)
    assert len(opened) >= 90
    for nth, start in enumerate(opened):
        for count, end in enumerate(opened[nth:], 1):
            assert count <= rate * (end - start + 0.5) + burst
