"""Cost against tenants: a drain whose runs belong to 10,000 orgs against one whose runs belong to one.

Called by `compare`. `--orgs` and `--rounds` make it small.
"""

from __future__ import annotations

from benchmarks.figures import Figure, Notes
from benchmarks.flows import noop
from benchmarks.ground import ground
from benchmarks.measures import drain_filled
from benchmarks.plan import Plan

ORGS = 10_000
RUNS = 30_000
# A drain takes seconds, so that these are about a minute of each.
ROUNDS = 15


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs of one org and many; the many are the same in every round."""
    notes = Notes("tenants")
    count = plan.runs(RUNS)
    orgs = min(count, plan.orgs or plan.runs(ORGS))
    async with ground() as at:
        one, many = await at.orgs(1), await at.orgs(orgs)
        for _ in range(plan.rounds_or(ROUNDS)):
            rates = []
            for org_ids, title in ((one, "1 org"), (many, f"{orgs:,} orgs")):
                await at.fill(noop, org_ids, count)
                await at.settle()
                rates.append(await drain_filled(at, [noop], count=count))
                await at.settle()
                notes.add(f"drain, {title}", "runs/s", rates[-1])
            notes.add("many orgs over one", "x", rates[1] / rates[0])
    return notes.figures()
