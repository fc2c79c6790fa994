"""The cost of runs that wait: 100,000 asleep or awaiting a person, and a drain beside them.

Called by `compare`. They are parked by a worker process whose memory is read after the first tenth and
at the end; then drains beside them and on an empty database alternate. `--waiting`, `--seconds` and
`--rounds` make it small.
"""

from __future__ import annotations

import asyncio

import psutil

from benchmarks.figures import Figure, Notes
from benchmarks.flows import asker, noop, sleeper
from benchmarks.ground import Ground, ground
from benchmarks.measures import SLOTS
from benchmarks.plan import Plan
from benchmarks.steady import drain_steadily
from benchmarks.worker import worker_process

WAITING = 100_000
SECONDS = 60.0
ROUNDS = 5
DEPTH = 1_000


async def measure(plan: Plan) -> list[Figure]:
    """Park the runs, then measure pairs of a drain beside them and one without."""
    notes = Notes("waiting")
    count = plan.waiting or plan.runs(WAITING)
    seconds = plan.seconds_or(SECONDS)
    async with ground() as full, ground() as empty:
        await _park(notes, full, count)
        orgs = []
        for at in (empty, full):
            orgs.append(await at.org())
            await at.fill(noop, [orgs[-1]], plan.depth or DEPTH)
            await at.settle()
        for _ in range(plan.rounds_or(ROUNDS)):
            without = (await drain_steadily(empty, orgs[0], seconds=seconds)).rate
            await empty.settle()
            beside = (await drain_steadily(full, orgs[1], seconds=seconds)).rate
            await full.settle()
            notes.add("drain without waiting runs", "runs/s", without)
            notes.add(f"drain beside {count:,} waiting runs", "runs/s", beside)
            notes.add("drain beside waiting runs over drain without", "x", beside / without)
    return notes.figures()


async def _park(notes: Notes, at: Ground, count: int) -> None:
    """Let a worker process park `count` runs; half sleep, half await a person."""
    org_id = await at.org()
    tenth = max(1, count // 10)
    print(f"  parking {count:,} runs", flush=True)
    async with worker_process(at.urls, SLOTS) as pid:
        await _park_more(at, org_id, tenth, until=tenth)
        before = psutil.Process(pid).memory_info().rss
        await _park_more(at, org_id, count - tenth, until=count)
        after = psutil.Process(pid).memory_info().rss
    notes.add("worker memory per waiting run", "bytes", (after - before) / max(1, count - tenth))
    notes.add("worker memory with all of them waiting", "MiB", after / 2**20)


async def _park_more(at: Ground, org_id: int, count: int, *, until: int) -> None:
    await at.fill(sleeper, [org_id], count - count // 2)
    await at.fill(asker, [org_id], count // 2)
    while await at.count("item", "state in ('waiting', 'awaiting_input')") < until:
        await asyncio.sleep(0.2)
