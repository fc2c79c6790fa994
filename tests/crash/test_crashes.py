"""A worker killed before and after each commit of the engine: another one takes over, nothing is lost.

The scenarios are made of the names in the source (points.py): the same mixed work is given to a worker that
ends itself at the point, and a point that the work does not pass fails its test.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable, Mapping

import pytest
from tests.crash.flows import REGISTRY, resources
from tests.crash.oracle import check
from tests.crash.points import names
from tests.crash.sink import Sink
from tests.crash.workload import People, intent, mixed, worker_process
from tests.engine.conftest import Pond

from millpond.db.queries import queries
from millpond.engine.claim import Claimer

END_S = 40.0
# Passages at which the worker ends, where the first one alone would show too little.
OFTEN = (1, 4)
PASSAGES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(names(), (1,)),
    **dict.fromkeys(("claim", "finish", "record", "park"), OFTEN),
}
SCENARIOS = [
    f"{when}:{name}#{passage}"
    for name, passages in PASSAGES.items()
    for when in ("before", "after")
    for passage in passages
]


async def _orphan(pond: Pond, people: People) -> None:
    """Leave a run under the lease of a worker that is no more."""
    await people.submit([intent(people.org_id, "crash.steps")])
    worker_id = uuid.uuid4()
    sql = queries("maintenance")["register_worker"]
    async with pond.engine_db.duty("test") as con:
        await con.execute(sql, worker_id, "gone", 1, "{}", [], 600.0)
    able = [flow.capability for flow in REGISTRY.flows.values()]
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=able, estimate_s=lambda _: 1.0
    )
    claimed, _ = await claimer.claim({"default": 1})
    assert len(claimed) == 1
    await _expire(pond, "gone")


async def _expire(pond: Pond, host: str = "") -> None:
    """Let the lease time of dead workers pass at once."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update worker set expires_at = clock_timestamp() - interval '1 second'"
            " where $1 in (host, '')",
            host,
        )


# What a point needs beside the mixed work.
ARRANGED: Mapping[str, Callable[[Pond, People], Awaitable[None]]] = {"rescue": _orphan}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_worker_killed_there_loses_and_repeats_nothing(
    pond: Pond, people: People, sink: Sink, scenario: str
) -> None:
    name = scenario.partition(":")[2].partition("#")[0]
    if name in ARRANGED:
        await ARRANGED[name](pond, people)
    await people.submit([*mixed(people.org_id), intent(people.org_id, "crash.holds")])
    async with worker_process(pond.urls.engine, sink, crash=scenario) as victim:
        await _until_dead_or_idle(victim, people)
        if victim.returncode is None:
            victim.terminate()  # it drains, which is a point too
        assert await asyncio.wait_for(victim.wait(), END_S) == -signal.SIGKILL, (
            f"the work does not pass {scenario}: add to tests/crash/flows.py what does"
        )
    sink.gate.set()
    await _expire(pond)
    given = resources(str(sink.path))
    async with pond.worker(flows=list(REGISTRY.flows.values()), resources=given):
        await people.until_left(0, END_S)
    await check(pond.engine_db, sink, people.accepted)


async def _until_dead_or_idle(victim: asyncio.subprocess.Process, people: People) -> None:
    """Wait until the worker is dead, or only the run that holds is left."""
    dead = asyncio.create_task(victim.wait())
    idle = asyncio.create_task(people.until_left(1, END_S))
    await asyncio.wait({dead, idle}, return_when=asyncio.FIRST_COMPLETED)
    dead.cancel()
    if not idle.done():
        idle.cancel()
    await asyncio.gather(dead, idle, return_exceptions=True)
