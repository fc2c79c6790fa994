"""Scale out: two worker processes against one, for steps that burn processor time in Python.

Called by `compare`. The rate is taken from the database's own times: from the first run that started to
the last that ended.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from benchmarks.figures import Figure, Notes
from benchmarks.flows import burn
from benchmarks.ground import Ground, ground
from benchmarks.plan import Plan
from benchmarks.worker import worker_process

RUNS = 1_500
ROUNDS = 5
SLOTS = 20


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs of one and two worker processes."""
    notes = Notes("scale")
    async with ground() as at:
        for _ in range(plan.rounds_or(ROUNDS)):
            rates = {}
            for processes, title in ((1, "one process"), (2, "two processes")):
                rates[processes] = await _drain(at, processes, plan.runs(RUNS))
                await at.settle()
                notes.add(f"burning steps, {title}", "runs/s", rates[processes])
            notes.add("two processes over one", "x", rates[2] / rates[1])
    return notes.figures()


async def _drain(at: Ground, processes: int, count: int) -> float:
    org_id = await at.org()
    async with AsyncExitStack() as stack:
        for _ in range(processes):
            await stack.enter_async_context(worker_process(at.urls, SLOTS))
        while await at.count("worker") < processes:
            await asyncio.sleep(0.05)
        # Both are there before there is work, and one hint wakes both.
        await at.fill(burn, [org_id], count)
        async with at.hints() as hints:
            hints.wake([burn.queue])
            while await at.count("item"):
                await asyncio.sleep(0.05)
        while await at.count("lease"):
            await asyncio.sleep(0.05)
    async with at.db.org(org_id) as con:
        took_s: float = await con.fetchval(
            "select extract(epoch from max(finished_at) - min(started_at))::float8 "
            "from run where org_id = $1",
            org_id,
        )
    return count / took_s
