"""Cost against backlog: the same drain with 1,000 and with 1,000,000 runs waiting, both held constant.

Called by `compare`. `--depth`, `--seconds` and `--rounds` make it small. Both databases stand through
all rounds; each is vacuumed and checkpointed after its turn.
"""

from __future__ import annotations

from benchmarks.figures import Figure, Notes, percentile
from benchmarks.flows import noop
from benchmarks.ground import Ground, ground
from benchmarks.plan import Plan
from benchmarks.steady import drain_steadily

SHALLOW = 1_000
DEEP = 1_000_000
SECONDS = 60.0
ROUNDS = 5


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs of a shallow and a deep backlog."""
    notes = Notes("backlog")
    deep_runs = plan.runs(DEEP) if plan.depth is None else plan.depth
    depths = {"shallow": min(SHALLOW, deep_runs), "deep": deep_runs}
    async with ground() as shallow, ground() as deep:
        sides = {"shallow": shallow, "deep": deep}
        orgs = {}
        for name, at in sides.items():
            orgs[name] = await at.org()
            print(f"  filling {depths[name]:,} runs", flush=True)
            await at.fill(noop, [orgs[name]], depths[name])
            await at.settle()
        for _ in range(plan.rounds_or(ROUNDS)):
            found = {
                name: await _turn(notes, at, orgs[name], f"{depths[name]:,} deep", plan)
                for name, at in sides.items()
            }
            notes.add("deep over shallow", "x", found["deep"][0] / found["shallow"][0])
            notes.add("claim p99, deep over shallow", "x", found["deep"][1] / found["shallow"][1])
    return notes.figures()


async def _turn(
    notes: Notes, at: Ground, org_id: int, title: str, plan: Plan
) -> tuple[float, float]:
    steady = await drain_steadily(at, org_id, seconds=plan.seconds_or(SECONDS))
    await at.settle()
    claim_s = percentile(steady.claims_s, 0.99)
    notes.add(f"drain, {title}", "runs/s", steady.rate)
    notes.add(f"claim p99, {title}", "ms", claim_s * 1e3)
    notes.add(f"refilled while drained, {title}", "%", steady.refilled * 100)
    return steady.rate, claim_s
