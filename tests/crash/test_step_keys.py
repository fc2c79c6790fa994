"""Workers killed around claims, parks and commits while steps ask for room and stand in line for it."""

from __future__ import annotations

import asyncio
import signal

import pytest
from tests.crash.arranged import expire
from tests.crash.flows import CHEST, REGISTRY, resources
from tests.crash.oracle import check
from tests.crash.sink import Sink
from tests.crash.workload import People, intent, worker_process
from tests.engine.conftest import Pond
from tests.engine.test_limits import limit

RUNS = 8
END_S = 40.0
SCENARIOS = [
    f"{when}:{name}#{passage}"
    for name, passages in {"claim": (3, 7), "park": (1, 3), "commit": (1, 4)}.items()
    for passage in passages
    for when in ("before", "after")
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_worker_killed_there_loses_no_step_that_asks(
    pond: Pond, people: People, sink: Sink, scenario: str
) -> None:
    await limit(pond.db, "provider:keyed", 2)
    flows = ("crash.needs_room", "crash.waits_beside")
    await people.submit([intent(people.org_id, flow) for _ in range(RUNS) for flow in flows])
    async with worker_process(pond.urls.engine, sink, crash=scenario, slots=4) as victim:
        assert await asyncio.wait_for(victim.wait(), END_S) == -signal.SIGKILL
    await expire(pond)
    given, pond.vault = resources(str(sink.path)), CHEST
    async with pond.worker({"default": 4}, registry=REGISTRY, resources=given):
        await people.until_left((), END_S)
        async with asyncio.timeout(END_S):
            while await pond.count("step_lease") or await pond.count("step_need"):
                await asyncio.sleep(0.05)
    await check(pond.engine_db, sink, people.accepted)
    assert await pond.count("run", "outcome = 'succeeded'") == RUNS * len(flows)
