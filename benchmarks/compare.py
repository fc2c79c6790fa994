"""The benchmark: Millpond beside its peers in one run, and Millpond's own suites, against the bar.

Run by `make bench` and `make bench-long`, or `python -m benchmarks.compare [--only …] [--rounds N]`.
Prints figures and ratios with their spread and writes benchmarks/out/latest.json. Invariant: what was
left out is named with its reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import bar
from benchmarks.figures import OUT, Figure, store
from benchmarks.ground import end_on_sigterm, machine, quiet
from benchmarks.plan import Plan
from benchmarks.suites import (
    accept,
    backlog,
    blocked_lanes,
    features,
    limits,
    noisy,
    pairs,
    retention,
    rls,
    scale,
    steadiness,
    tenants,
    waiting,
)
from benchmarks.systems import SYSTEMS
from millpond.cli.loop import run_loop

Suite = Callable[[Plan], Awaitable[list[Figure]]]
# Of `noisy` the part that no peer takes part in; the other is measured in pairs.
OWN: Mapping[str, Suite] = {
    "noisy": noisy.measure,
    "accept": accept.measure,
    "tenants": tenants.measure,
    "scale": scale.measure,
    "limits": limits.measure,
    "blocked": blocked_lanes.measure,
    "features": features.measure,
    "rls": rls.measure,
    "waiting": waiting.measure,
    "backlog": backlog.measure,
    "retention": retention.measure,
    "steadiness": steadiness.measure,
}
SUITES = tuple(dict.fromkeys((*pairs.SUITES, *OWN)))
# What `make bench` measures; the others take minutes each: `make bench-long`.
USUAL = (*pairs.SUITES, "accept", "tenants", "scale", "limits", "blocked")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)

    def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            found = [name for name in text.split(",") if name]
            if unknown := set(found) - set(names):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}: not among {', '.join(names)}"
                )
            return found

        return read

    parser.add_argument(
        "--only",
        type=some_of(SUITES),
        default=list(USUAL),
        help=f"suites, separated by commas, of {', '.join(SUITES)}; usually {', '.join(USUAL)}",
    )
    parser.add_argument(
        "--systems",
        type=some_of(list(SYSTEMS)),
        default=list(SYSTEMS),
        help=f"who is measured beside millpond, of {', '.join(SYSTEMS)}",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        choices=features.TITLES,
        default=[],
        metavar="TITLE",
        help=f"which of the suite `features`, all if unset: {'; '.join(features.TITLES)}",
    )
    parser.add_argument("--rounds", type=int, help="pairs of each; 5, of steadiness 1")
    parser.add_argument("--seconds", type=float, help="how long a steady drain is measured")
    parser.add_argument("--depth", type=int, help="runs waiting in a steady drain")
    parser.add_argument("--waiting", type=int, help="runs asleep or awaiting a person")
    parser.add_argument("--orgs", type=int, help="how many the many orgs of `tenants` are")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies counts of runs")
    parser.add_argument("--out", type=Path, default=OUT, help="where latest.json is written")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """Make the plan that the command line asks for."""
    return Plan(
        rounds=options.rounds,
        seconds=options.seconds,
        depth=options.depth,
        waiting=options.waiting,
        orgs=options.orgs,
        scale=options.scale,
        systems=options.systems,
        features=options.features,
    )


async def measure(plan: Plan, only: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """Measure the suites; returns the figures and who was left out, with the reason."""
    figures: list[Figure] = []
    left_out: dict[str, str] = {}
    paired = [suite for suite in pairs.SUITES if suite in only]
    if paired:
        figures, left_out = await pairs.measure(plan, paired)
    for name, suite in OWN.items():
        if name in only:
            print(f"suite {name}", flush=True)
            figures += await suite(plan)
    return figures, left_out


def main() -> None:
    """Measure, print, store."""
    options = parse()
    quiet()
    began = time.monotonic()
    figures: list[Figure] = []
    left_out: dict[str, str] = {}

    async def run() -> None:
        end_on_sigterm()
        found, missing = await measure(plan_of(options), options.only)
        figures.extend(found)
        left_out.update(missing)

    run_loop(run())
    path = store(figures, options.out)
    print(f"\nMillpond and its peers on {machine()}, medians (and range)\n")
    print(bar.table(figures))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"\ntook {(time.monotonic() - began) / 60:.1f} minutes, written to {path}")


if __name__ == "__main__":
    main()
