"""The quick benchmark: submit, drain, three steps and idle dispatch of Millpond alone, in minutes.

Run by `make bench-quick`, or `python -m benchmarks.quick [--rounds N] [--only drain,steps,…]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence

from benchmarks import measures
from benchmarks.figures import Figure, Notes, percentile, store
from benchmarks.flows import noop
from benchmarks.ground import Ground, ground, machine, quiet
from millpond.cli.loop import run_loop


async def measure(rounds: int, only: set[str], scale: float) -> list[Figure]:
    """Measure every figure `rounds` times, interleaved; `scale` multiplies the counts."""
    notes = Notes("quick")

    def runs(count: int) -> int:
        return max(2, int(count * scale))

    async def submits(at: Ground) -> None:
        found = await measures.submit_one_by_one(at, count=runs(300))
        p50 = percentile(found.took, 0.5)
        notes.add("submit, one at a time, p50", "ms", p50 * 1e3)
        notes.add("submit, one at a time, p99", "ms", percentile(found.took, 0.99) * 1e3)
        notes.add("submit p50 over a one-row commit", "x", p50 / percentile(found.commits, 0.5))
        notes.add(
            "submit p50 over a one-row transaction", "x", p50 / percentile(found.transactions, 0.5)
        )

    async def bulk(at: Ground) -> None:
        count = runs(10_000)
        took_s = await measures.bulk(at, count=count)
        notes.add("submit, 1,000 at a time", "runs/s", count / took_s)

    async def drains(at: Ground) -> None:
        for orgs in (1, 100):
            rate = await measures.drain(at, noop, orgs=orgs, count=runs(20_000))
            noun = "org" if orgs == 1 else "orgs"
            notes.add(f"drain of no-op runs, {orgs} {noun}", "runs/s", rate)

    async def steps(at: Ground) -> None:
        rate = await measures.three_steps(at, count=runs(8_000))
        notes.add("three durable steps", "runs/s", rate)

    async def idle(at: Ground) -> None:
        took = await measures.idle_dispatch(at, count=runs(300))
        notes.add("idle dispatch, p50", "ms", percentile(took, 0.5) * 1e3)
        notes.add("idle dispatch, p99", "ms", percentile(took, 0.99) * 1e3)

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
    return notes.figures()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="suites, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every count")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print a table, write benchmarks/out/latest.json."""
    quiet()
    options = parse()
    only = {name for name in options.only.split(",") if name}
    figures: list[Figure] = []

    async def run() -> None:
        figures.extend(await measure(options.rounds, only, options.scale))

    run_loop(run())
    print(f"\nMillpond on {machine()}, medians (and range) of {options.rounds} rounds")
    for figure in figures:
        print(figure.line())
    print(f"\nwritten to {store(figures)}")


if __name__ == "__main__":
    main()
