"""Neighbours of Millpond's alone: beside long runs, a noisy org against many quiet ones, long runs against short ones.

Called by `compare`, after the part of the suite that is measured in pairs. Every part has a fresh server, a worker
with 20 slots, and a backlog that outlasts it. `--seconds`, `--scale` and `--rounds` make it small.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from benchmarks import bar
from benchmarks.figures import Figure, Notes, percentile
from benchmarks.flows import SEEN, Nap, long_nap, nap
from benchmarks.ground import Ground, ground
from benchmarks.neighbours import (
    Shared,
    Visit,
    always,
    come,
    jain,
    resting,
    share,
    sharing,
    worker_seconds,
)
from benchmarks.peers.wire import NAP_S, SHARED_SLOTS
from benchmarks.plan import Plan
from millpond.engine.registry import Flow

ROUNDS = 3
# Beside long runs: how long they are, how often B comes, for how long.
LONG_S = (1.0, 3.0)
VISIT_EVERY_S = 0.25
SECONDS = 30.0
# A noisy org against quiet ones.
QUIET_ORGS = 100
NOISY_RUNS = 5_000
QUIET_EVERY_S = 1.0
BACKLOG_EACH = 30
# With fewer the time in which all have a backlog would be none.
LEAST_EACH = 12
# Long against short.
CONTEST_S = 8.0
WARM_S = 2.0
LONG_NAP_S = 0.2


async def measure(plan: Plan) -> list[Figure]:
    """Measure all parts, as often as asked for."""
    notes = Notes("noisy")
    for _ in range(plan.rounds_or(ROUNDS)):
        async with ground() as at:
            await _beside_long_runs(at, plan, notes)
        async with ground() as at:
            await _beside_quiet_orgs(at, plan, notes)
        async with ground() as at:
            await _all_with_a_backlog(at, plan, notes)
        for other, title in ((long_nap, ""), (nap, ", of one flow")):
            async with ground() as at:
                await _long_against_short(at, plan, notes, other, title)
    return notes.figures()


async def _beside_long_runs(at: Ground, plan: Plan, notes: Notes) -> None:
    """Let B come by while A's runs of 1 to 3 s have all the slots."""
    seconds = plan.seconds_or(SECONDS)
    warm_s = min(max(LONG_S), seconds)
    host, guest = await at.orgs(2)
    chance = random.Random(1)
    count = SHARED_SLOTS * (2 + round((warm_s + seconds) / min(LONG_S)))
    await at.fill(long_nap, [host], count, resting(_as_if_long_under_way(chance)))
    coming = [
        Visit(warm_s + (n + chance.random()) * VISIT_EVERY_S, guest)
        for n in range(max(2, int(seconds / VISIT_EVERY_S)))
    ]
    async with sharing(at, [nap, long_nap]) as hints:
        await _full(at)
        sent = await come(at, hints, coming)
        while sum(one.org_id == guest for one in SEEN.naps) < len(coming):
            await asyncio.sleep(0.01)
    waits = Shared(list(SEEN.naps), sent).waits()
    notes.add("B's wait beside runs of 1 to 3 s, p50", "ms", percentile(waits, 0.5) * 1e3)
    notes.add(bar.NOISY_LONG_P99, "ms", percentile(waits, 0.99) * 1e3)


def _as_if_long_under_way(chance: random.Random) -> Callable[[int], float]:
    """Draw lengths of runs; those of the first slots are cut, so that their ends do not come all at once."""

    def draw(nth: int) -> float:
        whole = chance.uniform(*LONG_S)
        return whole * chance.random() if nth < SHARED_SLOTS else whole

    return draw


async def _full(at: Ground) -> None:
    """Wait until every slot is taken."""
    while await at.count("lease") < SHARED_SLOTS:
        await asyncio.sleep(0.01)


async def _beside_quiet_orgs(at: Ground, plan: Plan, notes: Notes) -> None:
    """Let a hundred orgs come by now and then while one has a backlog."""
    count = plan.runs(NOISY_RUNS)
    host, *quiet = await at.orgs(1 + plan.runs(QUIET_ORGS))
    chance = random.Random(2)
    lasts_s = count * NAP_S / SHARED_SLOTS
    times = max(1, int(lasts_s / QUIET_EVERY_S))
    coming = [
        Visit((n + chance.random()) * lasts_s / times, org_id)
        for org_id in quiet
        for n in range(times)
    ]
    waits = (await share(at, host, count, coming)).waits()
    for name, share_of in (("p50", 0.5), ("p99", 0.99)):
        title = f"wait of {len(quiet)} quiet orgs beside a noisy one, {name}"
        notes.add(title, "ms", percentile(waits, share_of) * 1e3)


async def _all_with_a_backlog(at: Ground, plan: Plan, notes: Notes) -> None:
    """Let all have a backlog, the noisy org as much as the others together."""
    each = max(LEAST_EACH, plan.runs(BACKLOG_EACH))
    host, *quiet = await at.orgs(1 + plan.runs(QUIET_ORGS))
    change = always(NAP_S)
    await at.fill(nap, [host], each * len(quiet), change)
    await at.fill(nap, quiet, each * len(quiet), change)
    total = 2 * each * len(quiet)
    async with sharing(at, [nap]):
        while len(SEEN.naps) < total:
            await asyncio.sleep(0.005)
    used = worker_seconds(SEEN.naps, *_all_busy(SEEN.naps))
    rest = sum(used.values()) - used[host]
    notes.add(f"Jain's index, {len(used)} orgs with a backlog", "", jain(used))
    notes.add("share of the noisy org over that of another", "x", used[host] / (rest / len(quiet)))


def _all_busy(naps: list[Nap]) -> tuple[float, float]:
    """Return from when until when every org had runs waiting: to the first of their last starts."""
    last: dict[int, float] = {}
    for one in naps:
        last[one.org_id] = max(one.began, last.get(one.org_id, 0.0))
    return min(one.began for one in naps), min(last.values())


async def _long_against_short(
    at: Ground, plan: Plan, notes: Notes, other: Flow, title: str
) -> None:
    """Let runs of 200 ms and of 20 ms contend, both with a backlog all the time."""
    seconds = plan.seconds_or(CONTEST_S)
    warm_s = min(WARM_S, seconds)
    orgs = await at.orgs(2)
    lengths = (LONG_NAP_S, NAP_S)
    for org_id, flow, rest_s in zip(orgs, (other, nap), lengths, strict=True):
        enough = round(SHARED_SLOTS * (warm_s + seconds + 1.0) / rest_s)
        await at.fill(flow, [org_id], enough, always(rest_s))
    async with sharing(at, [nap, long_nap]):
        while {one.org_id for one in SEEN.naps} != {*orgs}:
            await asyncio.sleep(0.005)
        start = time.perf_counter() + warm_s
        await asyncio.sleep(warm_s + seconds)
        end = time.perf_counter()
    used = worker_seconds(SEEN.naps, start, end)
    longest = {
        org_id: max(one.ended - one.began for one in SEEN.naps if one.org_id == org_id)
        for org_id in orgs
    }
    bound = (SHARED_SLOTS + 1) * sum(longest.values())
    long, short = (used[org_id] for org_id in orgs)
    slots = SHARED_SLOTS * (end - start)
    notes.add(f"worker time of runs of 200 ms{title}", "%", 100 * long / slots)
    notes.add(f"worker time of runs of 20 ms{title}", "%", 100 * short / slots)
    notes.add(f"long over short runs, worker time{title}", "x", long / short)
    notes.add(f"{bar.NOISY_GAP}{title}", "x", abs(long - short) / bound)
