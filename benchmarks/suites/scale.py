"""Scale out: two and four worker processes against one, for steps that burn processor time in Python.

Called by `compare`. Rates are taken from the database's own times: from the first run that started to the last that
ended. Beside them, with four processes: how many runs went at once under a limit, and how two orgs shared the slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from benchmarks.bar import AT_ONCE
from benchmarks.figures import Figure, Notes
from benchmarks.flows import Nap, burn, nap
from benchmarks.ground import Ground, ground
from benchmarks.neighbours import always, jain, worker_seconds
from benchmarks.peers.wire import NAP_S
from benchmarks.plan import Plan
from benchmarks.worker import worker_process
from millpond.engine.registry import Flow

RUNS = 1_500
LIMITED_RUNS = 600
SHARED_RUNS = 3_000
ROUNDS = 5
SLOTS = 20
MOST = 3
PROCESSES = {1: "one process", 2: "two processes", 4: "four processes"}


async def measure(plan: Plan) -> list[Figure]:
    """Measure rounds of one, two and four worker processes, then what four keep to together."""
    notes = Notes("scale")
    async with ground() as at:
        for _ in range(plan.rounds_or(ROUNDS)):
            rates = {}
            for processes, title in PROCESSES.items():
                rates[processes] = await _rate(at, processes, plan.runs(RUNS))
                await at.settle()
                notes.add(f"burning steps, {title}", "runs/s", rates[processes])
            notes.add("two processes over one", "x", rates[2] / rates[1])
            notes.add("four processes over one", "x", rates[4] / rates[1])
            notes.add(AT_ONCE, "x", await _most_under_a_limit(at, plan.runs(LIMITED_RUNS)) / MOST)
            shares = await _shares(at, max(SLOTS, plan.runs(SHARED_RUNS)))
            notes.add("Jain's index of two orgs, four processes", "", jain(shares))
    return notes.figures()


async def _rate(at: Ground, processes: int, count: int) -> float:
    org_id = await at.org()
    async with _working(at, processes, burn):
        await at.fill(burn, [org_id], count)
    spans = await _spans(at, [org_id])
    return count / (max(one.ended for one in spans) - min(one.began for one in spans))


async def _most_under_a_limit(at: Ground, count: int) -> int:
    """Return how many runs of a flow went at once while only `MOST` may."""
    org_id, key = await at.org(), f"flow:{burn.name}"
    await at.limit(key, MOST)
    async with _working(at, 4, burn):
        await at.fill(burn, [org_id], count)
    await at.unlimit(key)
    return most_at_once(await _spans(at, [org_id]))


async def _shares(at: Ground, count: int) -> dict[int, float]:
    """Return the worker time of two orgs while both have runs waiting, one of them three times as many."""
    small, big = await at.orgs(2)
    async with _working(at, 4, nap):
        await at.fill(nap, [big], 3 * count, always(NAP_S))
        await at.fill(nap, [small], count, always(NAP_S))
    spans = await _spans(at, [small, big])
    last = {
        org_id: max(one.began for one in spans if one.org_id == org_id) for org_id in (small, big)
    }
    start = min(one.began for one in spans if one.org_id == small)
    return worker_seconds(spans, start, min(last.values()))


@asynccontextmanager
async def _working(at: Ground, processes: int, flow: Flow) -> AsyncIterator[None]:
    """Execute with so many worker processes what the block submits, all of it."""
    async with AsyncExitStack() as stack:
        for _ in range(processes):
            await stack.enter_async_context(worker_process(at.urls, SLOTS))
        while await at.count("worker") < processes:
            await asyncio.sleep(0.05)
        # All are there before there is work, and one hint wakes them all.
        yield
        async with at.hints() as hints:
            hints.wake([flow.queue])
            while await at.count("item"):
                await asyncio.sleep(0.05)
        while await at.count("lease"):
            await asyncio.sleep(0.05)


async def _spans(at: Ground, orgs: Sequence[int]) -> list[Nap]:
    """Return when the runs of these orgs had workers, by the database's clock."""
    spans = []
    for org_id in orgs:
        async with at.db.org(org_id) as con:
            rows = await con.fetch(
                "select run_id, extract(epoch from started_at)::float8 as began, "
                "extract(epoch from finished_at)::float8 as ended from run where org_id = $1",
                org_id,
            )
        spans += [Nap(org_id=org_id, **row) for row in rows]
    return spans


def most_at_once(spans: Iterable[Nap]) -> int:
    """Return how many of these went on at the same moment, at most; one may begin as another ends."""
    at_once = most = 0
    for _, change in sorted([(one.began, 1) for one in spans] + [(one.ended, -1) for one in spans]):
        at_once += change
        most = max(most, at_once)
    return most
