"""Retention beside the hot path: a steady drain while old runs are pruned, against one with nothing to prune.

Called by `compare`. Both databases hold the same history of 40 days ago, with three steps and eight events to a run.
On one side the worker keeps runs for 30 days, as by default, and deletes what is older in its batches and with its
rests; on the other it keeps everything. What is left to prune at the end is told. `--seconds`, `--rounds` and `--scale`
make it small.
"""

from __future__ import annotations

from benchmarks import bar
from benchmarks.figures import Figure, Notes, percentile
from benchmarks.flows import noop
from benchmarks.ground import PAYLOAD, Ground, ground
from benchmarks.plan import Plan
from benchmarks.steady import Steady, drain_steadily
from millpond.engine.retention import Keep

OLD = 1_000_000
SECONDS = 60.0
ROUNDS = 5
DEPTH = 1_000
BATCH = 20_000
DAY_S = 86_400.0
KEEP = Keep(runs_s=30 * DAY_S, keys_s=DAY_S, inbound_s=30 * DAY_S)
# Ids are UUIDs of version 7: their first 48 bits are the time in ms, here one for each run.
_IDS = f"""
create temporary table old on commit drop as
select (lpad(to_hex((extract(epoch from now() - interval '40 days') * 1000)::bigint + n), 12, '0')
        || '7' || substr(md5(n::text), 1, 19))::uuid as run_id
from generate_series($1::bigint, $1::bigint + {BATCH} - 1) n where n < $2::bigint
"""
_HISTORY = (
    """
insert into millpond.run (org_id, run_id, flow, version, queue, subject, input, output, outcome, attempts, created_at,
                          started_at, finished_at)
select $1::bigint, run_id, 'bench.old', 1, 'default', 'user:bench', $2::json, '3', 'succeeded', 1,
       now() - interval '40 days', now() - interval '40 days', now() - interval '40 days' from old
""",
    """
insert into millpond.step (org_id, run_id, step_key, name, kind, state, attempt, started_at)
select $1::bigint, run_id, s || ':0', s, 'step', 'done', 1, now() - interval '40 days'
from old, unnest(array['a', 'b', 'c']) s where $2::json is not null
""",
    """
insert into millpond.event (org_id, run_id, event_no, kind)
select $1::bigint, run_id, n, 'step.succeeded' from old, generate_series(1, 8) n where $2::json is not null
""",
)
_SIZE = """
select sum(pg_total_relation_size(c.oid))::float8 from pg_class c
where c.relnamespace = 'millpond'::regnamespace and c.relkind = 'r'
"""


async def measure(plan: Plan) -> list[Figure]:
    """Make the history, then measure pairs of a drain beside its pruning and one without."""
    notes = Notes("retention")
    old = plan.runs(OLD)
    async with ground() as without, ground() as beside:
        orgs = {}
        for at in (without, beside):
            orgs[id(at)] = await at.org()
            await at.fill(noop, [orgs[id(at)]], plan.depth or DEPTH)
            print(f"  making a history of {old:,} runs", flush=True)
            await _age(at, await at.org("history"), old)
            await at.settle()
        left = old
        for _ in range(plan.rounds_or(ROUNDS)):
            alone = await _drain(without, orgs[id(without)], None, plan)
            pruning = await _drain(beside, orgs[id(beside)], KEEP, plan)
            remain = await _left(beside)
            _note(notes, alone, pruning, left - remain)
            left = remain
        notes.add("old runs left to prune at the end", "", left)
        sizes = [float(await at.server.ask(_SIZE)) for at in (without, beside)]
        notes.add(
            "size of all tables at the end, with retention over without", "x", sizes[1] / sizes[0]
        )
    return notes.figures()


def _note(notes: Notes, alone: Steady, pruning: Steady, pruned: int) -> None:
    claims_s = [percentile(one.claims_s, 0.99) for one in (alone, pruning)]
    notes.add("drain with nothing to prune", "runs/s", alone.rate)
    notes.add("drain beside retention", "runs/s", pruning.rate)
    notes.add("old runs pruned beside it", "runs/s", pruned / pruning.ticks[-1][0])
    notes.add("claim p99 with nothing to prune", "ms", claims_s[0] * 1e3)
    notes.add("claim p99 beside retention", "ms", claims_s[1] * 1e3)
    notes.add(bar.RETENTION_RATE, "x", pruning.rate / alone.rate)
    notes.add(bar.RETENTION_CLAIM, "x", claims_s[1] / claims_s[0])


async def _drain(at: Ground, org_id: int, keep: Keep | None, plan: Plan) -> Steady:
    steady = await drain_steadily(at, org_id, seconds=plan.seconds_or(SECONDS), keep=keep)
    await at.settle()
    return steady


async def _age(at: Ground, org_id: int, count: int) -> None:
    """Make finished runs of 40 days ago, with their steps and events."""
    for start in range(0, count, BATCH):
        await at.server.change(
            (_IDS, start, count),
            *((statement, org_id, PAYLOAD.decode()) for statement in _HISTORY),
        )


async def _left(at: Ground) -> int:
    return await at.count("run", "flow = 'bench.old'")
