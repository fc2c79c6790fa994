"""A worker killed before and after each commit of the engine: another one takes over, nothing is lost.

The scenarios are made of the names in the source (points.py): the same mixed work is given to a worker that
ends itself at the point, and a point that the work does not pass fails its test.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping

import pytest
from tests.crash.arranged import ARRANGED, expire
from tests.crash.elsewhere import QUEUE
from tests.crash.flows import CHEST, REGISTRY, resources
from tests.crash.oracle import check
from tests.crash.points import names
from tests.crash.sink import Sink
from tests.crash.worker_process import KEEP
from tests.crash.workload import People, intent, mixed, worker_process
from tests.engine.conftest import Pond

END_S = 40.0
# Flows that stay in a step until the gate opens.
HOLDING = ("crash.holds", "crash.abandons")
SLOTS = {"default": 20, QUEUE: 20}
# Points that no worker passes, and why they need no scenario.
EXEMPT: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("limits_version", "limits_changes", "limits_newest", "limits_whole", "old_meters"),
            "look",
        ),
        "only reads",
    ),
    "sample_look": "reads, and the first one ever makes the row that is read",
    "block_step": "after a refused record of a failure; tests/engine/test_refused_steps.py",
    "charge_crossings": "as charge, where several queues need one key; lost it is a small unfairness",
    "check": "a command that only reads",
    "wake": "only reads which waits are over; what goes on then is crashed at its own points",
    "prune_preview": "a command that only reads",
    "prune_keys": "a command; each batch is whole by itself, and the next call goes on",
    "step_leave": "gives back early what the end of the lease does; tests/engine/test_step_keys.py",
    "usage_parts": "only reads which parts to add singly after a refusal",
    "drop_usage": "after a refusal that only a fault of numbers brings; tests/engine/test_metering.py",
    "prune_runs": "a command; each batch is whole by itself, and the next call goes on",
}
# Passages at which the worker ends, where the first one alone would show too little.
OFTEN = (1, 4)
PASSAGES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(names(), (1,)),
    **dict.fromkeys(("claim", "claim_at_once", "finish", "record", "park"), OFTEN),
}
SCENARIOS = [
    f"{when}:{name}#{passage}"
    for name, passages in PASSAGES.items()
    if name not in EXEMPT
    for when in ("before", "after")
    for passage in passages
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_worker_killed_there_loses_and_repeats_nothing(
    pond: Pond, people: People, sink: Sink, scenario: str
) -> None:
    name = scenario.partition(":")[2].partition("#")[0]
    promise = await ARRANGED[name](pond, people) if name in ARRANGED else None
    held = [intent(people.org_id, flow) for flow in HOLDING]
    await people.submit([*mixed(people.org_id), *held])
    async with worker_process(pond.urls.engine, sink, crash=scenario) as victim:
        await _until_dead_or_idle(victim, people)
        if victim.returncode is None:
            victim.terminate()  # it drains, which is a point too
        assert await asyncio.wait_for(victim.wait(), END_S) == -signal.SIGKILL, (
            f"the work does not pass {scenario}: add to tests/crash/flows.py what does"
        )
    sink.gate.set()
    await expire(pond)
    given, pond.vault = resources(str(sink.path)), CHEST
    async with pond.worker(SLOTS, registry=REGISTRY, resources=given, keep=KEEP):
        await people.until_left((), END_S)
        if promise is not None:
            await _until_kept(pond, *promise)
    await check(pond.engine_db, sink, people.accepted)
    async with pond.db.org(people.org_id) as con:
        refused = await con.fetchval("select count(*) from audit where action = 'run.refused'")
        assert refused == await con.fetchval(
            "select count(*) from run where flow = 'crash.revoked'"
        )


async def _until_kept(pond: Pond, condition: str, expected: int) -> None:
    """Wait until as many runs as promised are there; that is also how many there are in the end."""
    async with asyncio.timeout(END_S):
        while await pond.count("run", f"{condition} and outcome is not null") != expected:
            await asyncio.sleep(0.05)
    assert await pond.count("run", condition) == expected


async def _until_dead_or_idle(victim: asyncio.subprocess.Process, people: People) -> None:
    """Wait until the worker is dead, or only the runs that hold are left."""
    dead = asyncio.create_task(victim.wait())
    idle = asyncio.create_task(people.until_left(HOLDING, END_S))
    await asyncio.wait({dead, idle}, return_when=asyncio.FIRST_COMPLETED)
    dead.cancel()
    if not idle.done():
        idle.cancel()
    await asyncio.gather(dead, idle, return_exceptions=True)
