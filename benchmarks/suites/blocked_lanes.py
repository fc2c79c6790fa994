"""Blocked lanes: a drain beside 10,000 lanes that are parked under one full key, against a drain without them.

Called by `compare`. The key has one place; a worker process beside holds it with a run that goes on and on, on both
sides, so that the lanes are all that differs. The worker that drains could do their work, so that each of its claims
looks at the key. Claims are timed by that worker's own clock. `--scale`, `--orgs` and `--rounds` make it small.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from benchmarks import bar
from benchmarks.figures import Figure, Notes, percentile
from benchmarks.flows import holder, noop
from benchmarks.ground import Ground, ground
from benchmarks.measures import SLOTS, drain_filled
from benchmarks.plan import Plan
from benchmarks.steady import claims_timed
from benchmarks.worker import worker_process
from millpond.types import Intent

KEY = "provider:blocked"
LANES = 10_000
ORGS = 100
RUNS = 15_000
ROUNDS = 5
# Time that is no use to a run that goes on and on.
DRAIN_S = 0.1


async def measure(plan: Plan) -> list[Figure]:
    """Park the lanes, then measure pairs of a drain beside them and one without."""
    notes = Notes("blocked")
    lanes, count = plan.runs(LANES), plan.runs(RUNS)
    title = f"beside {lanes:,} blocked lanes"
    async with _held() as without, _held() as beside:
        await _park(beside, lanes, min(lanes, plan.orgs or ORGS))
        orgs = {id(at): await at.org() for at in (without, beside)}
        for at in (without, beside):
            await _drain(at, orgs[id(at)], count)  # prepares what all later ones find
        for _ in range(plan.rounds_or(ROUNDS)):
            rate, claim_s = await _drain(without, orgs[id(without)], count)
            rate_beside, claim_beside_s = await _drain(beside, orgs[id(beside)], count)
            notes.add("drain without blocked lanes", "runs/s", rate)
            notes.add(f"drain {title}", "runs/s", rate_beside)
            notes.add("claim p99 without blocked lanes", "ms", claim_s * 1e3)
            notes.add(f"claim p99 {title}", "ms", claim_beside_s * 1e3)
            notes.add(bar.BLOCKED_RATE, "x", rate_beside / rate)
            notes.add(bar.BLOCKED_CLAIM, "x", claim_beside_s / claim_s)
        parked = await beside.count("lane", "parked_on is not null and not active")
        notes.add("lanes still parked at the end", "", parked)
    return notes.figures()


@asynccontextmanager
async def _held() -> AsyncIterator[Ground]:
    """Start a fresh server where the one place under the key is held by another process."""
    async with ground() as at:
        await at.limit(KEY, 1)
        await at.fill(holder, [await at.org()], 1, lambda intent, _: replace(intent, keys=(KEY,)))
        async with worker_process(at.urls, 1, drain_s=DRAIN_S):
            while not await at.count("lease"):
                await asyncio.sleep(0.05)
            yield at


async def _park(at: Ground, lanes: int, orgs: int) -> None:
    """Submit a run to each of so many lanes, and claim until all of them are parked."""
    print(f"  parking {lanes:,} lanes", flush=True)
    await at.fill(noop, await at.orgs(orgs), lanes, _in_a_lane_of_its_own)
    async with at.worker([noop], SLOTS):
        while await at.count("lane", "parked_on is not null and not active") < lanes:
            await asyncio.sleep(0.05)
    await at.settle()


def _in_a_lane_of_its_own(intent: Intent, nth: int) -> Intent:
    return replace(intent, keys=(KEY, f"ticket:{intent.org_id}-{nth}"))


async def _drain(at: Ground, org_id: int, count: int) -> tuple[float, float]:
    """Drain runs of an org that need no key; returns their rate, and the 99th percentile of claims in seconds."""
    claims_s: list[float] = []
    await at.fill(noop, [org_id], count)
    await at.settle()
    with claims_timed(claims_s):
        rate = await drain_filled(at, [noop], count=count, org_id=org_id)
    await at.settle()
    return rate, percentile(claims_s, 0.99)
