"""The cost of limits: a drain of runs with 0, 1, 3 and 6 limited keys each, against one with a single limited key.

Called by `compare`. Every key that a run has is limited, by more than is ever in use: what is measured is the counting
of what nothing stands in the way of. With 0 keys no limit is set at all. `--scale` and `--rounds` make it small.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from benchmarks import bar
from benchmarks.figures import Figure, Notes
from benchmarks.flows import noop
from benchmarks.ground import Ground, ground
from benchmarks.measures import drain_filled
from benchmarks.plan import Plan
from millpond.types import Intent

KEYS = (
    "provider:bench",
    "model:bench",
    "integration:bench",
    "source:bench",
    "region:bench",
    "tool:bench",
)
COUNTS = (0, 1, 3, 6)
ORGS = 20
RUNS = 5_000
ROUNDS = 5
# A worker holds at most twice its slots.
NEVER_FULL = 100_000


async def measure(plan: Plan) -> list[Figure]:
    """Measure the drains in turn, on one server."""
    notes = Notes("limits")
    count = plan.runs(RUNS)
    async with ground() as at:
        org_ids = await at.orgs(min(count, plan.orgs or ORGS))
        await _drain(at, org_ids, count, KEYS[:1])  # prepares what all later ones find
        for _ in range(plan.rounds_or(ROUNDS)):
            rates = {}
            for many in COUNTS:
                rates[many] = await _drain(at, org_ids, count, KEYS[:many])
                notes.add(f"drain, {_titled(many)}", "runs/s", rates[many])
            for many in COUNTS:
                if many != 1:
                    notes.add(bar.limited(_titled(many)), "x", rates[many] / rates[1])
    return notes.figures()


def _titled(many: int) -> str:
    return f"{many} limited key{'' if many == 1 else 's'}"


async def _drain(at: Ground, org_ids: Sequence[int], count: int, keys: Sequence[str]) -> float:
    """Drain runs with these keys, each of them limited; what the server would do later is done after it."""
    async with limited(at, keys):
        await at.fill(noop, org_ids, count, keyed(keys))
        await at.settle()
        rate = await drain_filled(at, [noop], count=count)
    await at.settle()
    return rate


@asynccontextmanager
async def limited(at: Ground, keys: Sequence[str]) -> AsyncIterator[None]:
    """Limit each of these keys, for all orgs together."""
    for key in keys:
        await at.limit(key, NEVER_FULL)
    try:
        yield
    finally:
        for key in keys:
            await at.unlimit(key)


def keyed(keys: Sequence[str]) -> Callable[[Intent, int], Intent]:
    """Give runs these keys, beside that of their org."""
    return lambda intent, _: replace(intent, keys=(*intent.keys, *keys))
