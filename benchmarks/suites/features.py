"""What each feature costs: a drain of runs that use it against a drain of plain ones, in pairs.

Called by `compare`. What is always on has no switch, so its cost is seen only by changing the throwaway
database: a role without row-level security, commits that do not wait for the disk, a trigger that
throws events or usage away (a lower bound, since the trigger takes time itself). Invariant: the product's code
is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.figures import Figure, Notes
from benchmarks.flows import (
    child,
    emit,
    mapped,
    noop,
    now,
    one,
    parallel,
    parent,
    registered,
    three,
)
from benchmarks.ground import Server, open_ground, postgres
from benchmarks.measures import drain
from benchmarks.plan import Plan
from millpond.engine.registry import Flow
from millpond.types import Intent

RUNS = 8_000
ROUNDS = 5
Change = Callable[[Intent, int], Intent]


def _same(intent: Intent, _: int) -> Intent:
    return intent


def row_level_security(action: str) -> str:
    """Return the statement that enables or disables it on every tenant table."""
    return f"""
    do $$ declare tenant text; begin
      for tenant in select relname from pg_class
        where relnamespace = 'millpond'::regnamespace and relkind in ('r', 'p') and relforcerowsecurity
      loop execute format('alter table millpond.%I {action} row level security', tenant); end loop;
    end $$"""


def _roles(setting: str) -> list[str]:
    return [f"alter role {role} {setting}" for role in ("millpond_app", "millpond_engine")]


FORGET_EVENTS = (
    """create or replace function millpond.bench_forget() returns trigger language plpgsql
       as $$ begin return null; end $$""",
    """create trigger bench_forget before insert on millpond.event
       for each row execute function millpond.bench_forget()""",
)
FORGET_USAGE = (
    FORGET_EVENTS[0],
    """create trigger bench_forget before insert on millpond.usage_part
       for each row execute function millpond.bench_forget()""",
)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A use of a feature, or something always on that the throwaway database goes without.

    `portion` makes slow ones short: the share of the usual count of runs.
    """

    title: str
    flow: Flow = noop
    also: Sequence[Flow] = ()
    portion: float = 1.0
    change: Change = _same
    alter: Sequence[str] = ()
    undo: Sequence[str] = ()


FEATURES = (
    Feature(
        title="five labels",
        change=lambda intent, n: replace(intent, labels={f"label{k}": str(n) for k in range(5)}),
    ),
    Feature(
        title="three keys",
        change=lambda intent, _: replace(
            intent, keys=(*intent.keys, "provider:bench", "model:bench")
        ),
    ),
    Feature(
        title="twenty priorities",
        change=lambda intent, n: replace(intent, priority=n % 20),
    ),
    Feature(title="a deadline", change=lambda intent, _: replace(intent, deadline_s=3600.0)),
    Feature(title="a progress event", flow=emit),
    Feature(title="one step", flow=one),
    Feature(title="one registered step", flow=registered),
    Feature(title="three steps", flow=three),
    Feature(title="three parallel steps", flow=parallel),
    Feature(title="three mapped steps", flow=mapped),
    Feature(title="a recorded time", flow=now),
    Feature(title="a child run, awaited", flow=parent, also=[child], portion=0.1),
    Feature(
        title="no row-level security",
        alter=[row_level_security("disable")],
        undo=[row_level_security("enable")],
    ),
    Feature(
        title="no wait for the disk",
        alter=_roles("set synchronous_commit = off"),
        undo=_roles("reset synchronous_commit"),
    ),
    Feature(
        title="events thrown away",
        alter=FORGET_EVENTS,
        undo=["drop trigger bench_forget on millpond.event"],
    ),
    Feature(
        title="no metering",
        alter=FORGET_USAGE,
        undo=["drop trigger bench_forget on millpond.usage_part"],
    ),
)
PLAIN = Feature(title="plain")
TITLES = tuple(feature.title for feature in FEATURES)


async def measure(plan: Plan) -> list[Figure]:
    """Measure pairs of a plain drain and one with the feature, on one server."""
    notes = Notes("features")
    count = plan.runs(RUNS)
    chosen = [one for one in FEATURES if not plan.features or one.title in plan.features]
    async with postgres() as server:
        # The first drain of a server prepares what all later ones find.
        await _drain(server, PLAIN, count)
        for _ in range(plan.rounds_or(ROUNDS)):
            for feature in chosen:
                plain = await _drain(server, PLAIN, count)
                rate = await _drain(server, feature, count)
                notes.add("drain, plain", "runs/s", plain)
                notes.add(f"drain, {feature.title}", "runs/s", rate)
                notes.add(f"{feature.title}, added per run", "µs", (1 / rate - 1 / plain) * 1e6)
                notes.add(f"{feature.title}, share of the plain rate", "x", rate / plain)
    return notes.figures()


async def _drain(server: Server, feature: Feature, count: int) -> float:
    """Drain on pools of its own, so that a changed role takes effect."""
    count = max(2, round(count * feature.portion))
    await server.alter(*feature.alter)
    try:
        async with open_ground(server) as at:
            return await drain(
                at, feature.flow, count=count, change=feature.change, also=feature.also
            )
    finally:
        await server.alter(*feature.undo)
        await server.settle()
