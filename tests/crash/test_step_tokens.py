"""Workers killed around claims, parks and commits while steps reserve tokens: each use is counted, once."""

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
from tests.engine.test_tokens import left

RUNS = 6
END_S = 40.0
DAY_S = 86_400.0
NEED, USED, AT_ONCE = 400, 10, 4
SCENARIOS = [
    f"{when}:{name}#{passage}"
    for name, passages in {"claim": (3, 7), "park": (1, 3), "commit": (1, 5)}.items()
    for passage in passages
    for when in ("before", "after")
]


async def told(pond: Pond) -> int:
    """Return how many tokens records tell of."""
    async with pond.engine_db.duty("test") as con:
        total: int = await con.fetchval(
            "select coalesce((select sum(t) from usage_part p, unnest(p.input_tokens) t), 0)"
            " + coalesce((select sum(input_tokens) from usage_day), 0)"
        )
    return int(total)


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_worker_killed_there_leaves_no_token_uncounted(
    pond: Pond, people: People, sink: Sink, scenario: str
) -> None:
    key, room = "provider:metered", "tokens 0 0 provider:metered"
    await limit(pond.db, key, 100, kind="tokens", period_s=DAY_S, burst=AT_ONCE * NEED + 100)
    await people.submit([intent(people.org_id, "crash.needs_tokens") for _ in range(RUNS)])
    async with worker_process(pond.urls.engine, sink, crash=scenario, slots=4) as victim:
        assert await asyncio.wait_for(victim.wait(), END_S) == -signal.SIGKILL
    await expire(pond)
    # What was lost with it stays used: the others need more than is left then.
    await limit(pond.db, key, 100, kind="tokens", period_s=DAY_S, burst=30_000)
    given, pond.vault = resources(str(sink.path)), CHEST
    async with pond.worker({"default": 4}, registry=REGISTRY, resources=given):
        await people.until_left((), END_S)
        async with asyncio.timeout(END_S):
            while await pond.count("reservation") or await pond.count("step_lease"):
                pond.hints.wake(["default"])
                await asyncio.sleep(0.05)
    await check(pond.engine_db, sink, people.accepted)
    assert await pond.count("run", "outcome = 'succeeded'") == RUNS
    assert await told(pond) == RUNS * 3 * USED
    # Tries that were under way in the killed worker keep what they had reserved, whole.
    lost = 30_000 - await left(pond, 30_000, room) - RUNS * 3 * USED
    assert lost % NEED == 0
    assert 0 <= lost <= AT_ONCE * NEED
