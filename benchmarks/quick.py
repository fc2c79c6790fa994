"""The quick benchmark: submit, drain, three steps and idle dispatch of Millpond alone, in minutes.

Run by `make bench-quick`, or `python -m benchmarks.quick [--rounds N] [--only drain,steps,…]`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

from benchmarks.ground import Figure, Ground, ground, machine, store
from millpond.cli.loop import run_loop
from millpond.engine.context import Context
from millpond.engine.registry import Flow, Registry, flow
from millpond.engine.submit import submit

REGISTRY = Registry()
SLOTS = 200
_started: dict[str, asyncio.Future[float]] = {}
_calls: list[None] = []


@flow("bench.noop", registry=REGISTRY)
async def noop(ctx: Context, data: dict[str, str]) -> None:
    """Do nothing but be counted."""
    _calls.append(None)


@flow("bench.three", registry=REGISTRY)
async def three(ctx: Context, data: dict[str, str]) -> int:
    """Take three durable steps."""
    _calls.append(None)
    total = 0
    for name in ("a", "b", "c"):
        total += await ctx.step(name, _one)
    return total


@flow("bench.mark", registry=REGISTRY)
async def mark(ctx: Context, data: dict[str, str]) -> None:
    """Note when the first line of flow code runs."""
    _started[str(ctx.run_id)].set_result(time.perf_counter())


async def _one() -> int:
    return 1


async def drain(at: Ground, flow: Flow, *, orgs: int, count: int) -> float:
    """Return runs per second for `count` runs that wait when the worker starts."""
    org_ids = [await at.org(f"d{time.time_ns()}-{n}") for n in range(orgs)]
    await at.fill(flow, org_ids, count)
    return await drain0(at, flow, count=count)


async def drain0(at: Ground, flow: Flow, *, count: int) -> float:
    """Return runs per second until the `count` waiting runs have ended."""
    _calls.clear()
    async with at.worker([flow], SLOTS):
        while not _calls:
            await asyncio.sleep(0.001)
        began, first = time.perf_counter(), len(_calls)
        while len(_calls) < count or await at.left():
            await asyncio.sleep(0.01)
        return (count - first) / (time.perf_counter() - began)


async def submit_one_by_one(at: Ground, *, count: int = 300) -> tuple[float, float, float]:
    """Return p50 and p99 of a submit and p50 of a bare one-row commit, in ms."""
    org_id = await at.org(f"s{time.time_ns()}")
    async with at.db.globals() as con:
        await con.execute("select 1")
    took, bare = [], []
    for n in range(count):
        began = time.perf_counter()
        async with at.db.org(org_id) as con:
            await submit(con, [at.intent(noop, org_id)])
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        async with at.db.globals() as con:
            await con.execute("insert into org (slug, name) values ($1, 'x')", f"b{n}-{org_id}")
        bare.append(time.perf_counter() - began)
    async with at.worker([noop], SLOTS):
        while await at.left():
            await asyncio.sleep(0.01)
    took.sort()
    bare.sort()
    return took[count // 2] * 1e3, took[int(count * 0.99)] * 1e3, bare[count // 2] * 1e3


async def idle_dispatch(at: Ground, *, count: int = 300) -> tuple[float, float]:
    """Return p50 and p99 from before the submit to the first line of flow code, in ms."""
    org_id = await at.org(f"i{time.time_ns()}")
    took = []
    async with at.worker([mark], SLOTS), at.hints() as hints:
        await asyncio.sleep(1.5)
        for _ in range(count):
            intent = at.intent(mark, org_id)
            started = _started[str(intent.run_id)] = asyncio.get_running_loop().create_future()
            began = time.perf_counter()
            async with at.db.org(org_id) as con:
                await submit(con, [intent])
            hints.wake([intent.queue])
            took.append(await started - began)
            await asyncio.sleep(0.02)
    took.sort()
    return took[count // 2] * 1e3, took[int(count * 0.99)] * 1e3


async def measure(rounds: int, only: set[str]) -> list[Figure]:
    """Measure every figure `rounds` times, interleaved."""
    runs: dict[tuple[str, str], list[float]] = {}

    def add(figure: str, unit: str, value: float) -> None:
        runs.setdefault((figure, unit), []).append(value)
        print(f"  {figure}: {value:,.2f} {unit}", flush=True)

    async def submits(at: Ground) -> None:
        p50, p99, bare = await submit_one_by_one(at)
        add("submit, one at a time, p50", "ms", p50)
        add("submit, one at a time, p99", "ms", p99)
        add("submit p50 over a one-row commit", "x", p50 / bare)

    async def bulk(at: Ground) -> None:
        org_id = await at.org(f"f{time.time_ns()}")
        began = time.perf_counter()
        await at.fill(noop, [org_id], 10_000)
        add("submit, 1,000 at a time", "runs/s", 10_000 / (time.perf_counter() - began))
        async with at.worker([noop], SLOTS):
            while await at.left():
                await asyncio.sleep(0.01)

    async def drains(at: Ground) -> None:
        add("drain of no-op runs, 1 org", "runs/s", await drain(at, noop, orgs=1, count=20_000))
        add(
            "drain of no-op runs, 100 orgs", "runs/s", await drain(at, noop, orgs=100, count=20_000)
        )

    async def steps(at: Ground) -> None:
        add("three durable steps", "runs/s", await drain(at, three, orgs=1, count=8_000))

    async def idle(at: Ground) -> None:
        p50, p99 = await idle_dispatch(at)
        add("idle dispatch, p50", "ms", p50)
        add("idle dispatch, p99", "ms", p99)

    suites: dict[str, Callable[[Ground], Awaitable[None]]] = {
        "submit": submits,
        "bulk": bulk,
        "drain": drains,
        "steps": steps,
        "idle": idle,
    }
    async with ground() as at:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            for name, suite in suites.items():
                if not only or name in only:
                    await suite(at)
    return [Figure.of("quick", figure, unit, values) for (figure, unit), values in runs.items()]


async def _measure_into(figures: list[Figure], rounds: int, only: set[str]) -> None:
    figures += await measure(rounds, only)


def main() -> None:
    """Measure, print a table, write benchmarks/out/latest.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="suites, separated by commas")
    options = parser.parse_args()
    only = {name for name in options.only.split(",") if name}
    figures: list[Figure] = []
    run_loop(_measure_into(figures, options.rounds, only))
    print(f"\nMillpond on {machine()}, medians (and range) of {options.rounds} rounds")
    for figure in figures:
        print(figure.line())
    print(f"\nwritten to {store(figures)}")


if __name__ == "__main__":
    main()
