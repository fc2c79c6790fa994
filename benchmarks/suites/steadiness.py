"""Steadiness: ten minutes of balanced submit and drain, the last minute against the first.

Called by `compare`. Measured twice: alone, and with another client's transaction open from before the
first run to the end, which keeps every dead row from being vacuumed. `--seconds` makes it small.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from benchmarks.figures import Figure, Notes
from benchmarks.flows import noop
from benchmarks.ground import Ground, ground
from benchmarks.plan import Plan
from benchmarks.steady import drain_steadily

SECONDS = 600.0
WINDOW_S = 60.0
DEPTH = 1_000
ROUNDS = 1


async def measure(plan: Plan) -> list[Figure]:
    """Measure both kinds, each on a fresh database."""
    notes = Notes("steadiness")
    for _ in range(plan.rounds_or(ROUNDS)):
        for suffix in ("", ", beside an open transaction"):
            await _measure(notes, plan, suffix)
    return notes.figures()


async def _measure(notes: Notes, plan: Plan, suffix: str) -> None:
    seconds = plan.seconds_or(SECONDS)
    window_s = min(WINDOW_S, seconds / 4)
    async with ground() as at:
        org_id = await at.org()
        await at.fill(noop, [org_id], plan.depth or DEPTH)
        if suffix:
            async with _open_transaction(at):
                steady = await drain_steadily(at, org_id, seconds=seconds)
        else:
            steady = await drain_steadily(at, org_id, seconds=seconds)
    first = steady.rate_between(0.0, window_s)
    ended_s = steady.ticks[-1][0]
    last = steady.rate_between(ended_s - window_s, ended_s)
    notes.add(f"drain, first {window_s:.0f} s{suffix}", "runs/s", first)
    notes.add(f"drain, last {window_s:.0f} s{suffix}", "runs/s", last)
    notes.add(f"drain, whole time{suffix}", "runs/s", steady.rate)
    notes.add(f"last over first{suffix}", "x", last / first)


@asynccontextmanager
async def _open_transaction(at: Ground) -> AsyncIterator[None]:
    """Hold a transaction with its snapshot open, as a forgotten session would."""
    con = await asyncpg.connect(at.urls.owner)
    try:
        async with con.transaction(isolation="repeatable_read"):
            await con.fetchval("select pg_current_xact_id()")
            yield
    finally:
        await con.close()
