"""Accept over HTTP: the API process against a bare endpoint that checks a token and commits one row, in pairs.

Called by `compare`. All doors stand on one Postgres, and are sent the same 226 bytes over 32 connections by a load in
a process of its own; in the last turn of a pair a worker drains a backlog of the same org beside the API. While one
is measured nothing else works. The org has quotas and rates, and each turn of the API is checked to have counted
them. `--seconds` and `--rounds` make it small.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from benchmarks import bar
from benchmarks.doors import Door, Doors, check_limited, doors
from benchmarks.figures import OURS, Figure, Notes
from benchmarks.flows import accepted, noop
from benchmarks.ground import PAYLOAD, Ground, ground
from benchmarks.load import Load, Loader, loader
from benchmarks.measures import SLOTS
from benchmarks.plan import Plan
from benchmarks.worker import worker_process

CONNECTIONS = 32
SECONDS = 5.0
ROUNDS = 5
WITH_KEY = "accept over HTTP with an API key"
REMEMBERING = f"{bar.BARE}, memo"
# More than a worker drains in a second beside the load.
BACKLOG_PER_S = 16_000
LIVE = f"flow = '{noop.name}' and finished_at is null"
BODY = orjson.dumps({"flow": accepted.name, "input": orjson.Fragment(PAYLOAD)})


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs; who is first in one changes."""
    notes = Notes("accept")
    with tempfile.TemporaryDirectory(prefix="millpond-bench-") as folder:
        async with ground() as at, loader() as load:
            org_id = await at.org()
            await at.clear([accepted], SLOTS)  # publishes the flow
            async with doors(at, org_id, Path(folder)) as ways:
                for number in range(plan.rounds_or(ROUNDS)):
                    await _pair(notes, plan, at, org_id, load, ways, turned=number % 2 == 1)
    return notes.figures()


async def _pair(
    notes: Notes,
    plan: Plan,
    at: Ground,
    org_id: int,
    load: Loader,
    ways: Doors,
    *,
    turned: bool,
) -> None:
    order: Sequence[tuple[Door, str, str]] = (
        (ways.bare, bar.ACCEPT, bar.BARE),
        (ways.bare_remembering, bar.ACCEPT, REMEMBERING),
        (ways.api, bar.ACCEPT, OURS),
        (ways.api_by_key, WITH_KEY, OURS),
    )
    found = {}
    for door, title, system in reversed(order) if turned else order:
        found[door] = await _turn(plan, load, door)
        if system == OURS:
            await check_limited(at, org_id, door, BODY)
        await _clean(at)
        _note(notes, title, system, found[door])
    beside, drained = await _beside_a_drain(plan, at, org_id, load, ways.api)
    _note(notes, bar.ACCEPT_BESIDE, OURS, beside)
    notes.add("drain beside the load", "runs/s", drained)
    busiest = max(one.core_share for one in (*found.values(), beside))
    notes.add("the load's own share of a core, at most", "%", busiest * 100)
    for door, name in ((ways.bare, bar.BARE), (ways.bare_remembering, REMEMBERING)):
        bare, peer = found[door], bar.over(name)
        for title, mine in ((bar.ACCEPT, found[ways.api]), (WITH_KEY, found[ways.api_by_key])):
            notes.add(f"{title}, rate", "x", mine.rate / bare.rate, peer)
            notes.add(f"{title}, p99", "x", mine.p99_s / bare.p99_s, peer)
        notes.add(f"{bar.ACCEPT_BESIDE}, p99", "x", beside.p99_s / bare.p99_s, peer)


async def _turn(plan: Plan, load: Loader, door: Door) -> Load:
    return await load.turn(
        port=door.port,
        path=door.path,
        token=door.token,
        body=BODY,
        connections=CONNECTIONS,
        seconds=plan.seconds_or(SECONDS),
    )


async def _beside_a_drain(
    plan: Plan, at: Ground, org_id: int, load: Loader, door: Door
) -> tuple[Load, float]:
    """Measure while a worker process drains a backlog; returns also how many runs a second it drained.

    Raises RuntimeError when it was done before the load was.
    """
    backlog = round(BACKLOG_PER_S * (plan.seconds_or(SECONDS) + 1))
    await at.fill(noop, [org_id], backlog)
    await at.settle()
    async with worker_process(at.urls, SLOTS):
        while not await at.count("worker"):
            await asyncio.sleep(0.05)
        before, began = await at.count("run", LIVE), time.perf_counter()
        found = await _turn(plan, load, door)
        left, took_s = await at.count("run", LIVE), time.perf_counter() - began
    await _clean(at)
    if not left:
        raise RuntimeError(f"the backlog of {backlog} runs was drained before the load ended")
    return found, (before - left) / took_s


async def _clean(at: Ground) -> None:
    """Leave nothing to the next turn: run what was accepted, then vacuum."""
    await at.clear([accepted, noop], SLOTS)
    await at.settle()


def _note(notes: Notes, title: str, system: str, found: Load) -> None:
    notes.add(f"{title}, rate", "req/s", found.rate, system)
    notes.add(f"{title}, p50", "ms", found.p50_s * 1e3, system)
    notes.add(f"{title}, p99", "ms", found.p99_s * 1e3, system)
