"""A simulation of the admission: 10,000 orgs, 1,000,000 runs and a virtual clock, by the product's own decisions.

Run by `python -m benchmarks.simulate`. Prints how slots were shared, how long runs waited and Jain's index, beside what
one line for all (first come, first served) makes of the same runs; writes `benchmarks/out/simulate.json`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from benchmarks.figures import OUT
from millpond.engine.keying import parse_key
from millpond.engine.loads import Load, Outcome, Work
from millpond.engine.rules import Rule, Rules
from millpond.engine.simulated import Figures, OrgFigures, figures, waits
from millpond.engine.simulating import simulate

QUEUE = "default"
PROVIDERS = 20


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is simulated. `load` is the work that arrives over what slots can do; `noisy` orgs send `noise` times more.

    Every third org has weight 2. With `keys`, each run uses one of 20 providers, each limited to its part of the slots.
    """

    orgs: int = 10_000
    runs: int = 1_000_000
    slots: int = 256
    workers: int = 4
    load: float = 1.5
    noisy: int = 100
    noise: float = 100.0
    mean_s: float = 1.0
    keys: bool = False
    seed: int = 1


def weights_of(scene: Scene) -> dict[int, float]:
    """Return the weights of orgs."""
    return {org_id: 2.0 if org_id % 3 == 0 else 1.0 for org_id in range(1, scene.orgs + 1)}


def workers_of(scene: Scene) -> list[dict[str, int]]:
    """Return the slots of each worker."""
    each, more = divmod(scene.slots, scene.workers)
    return [{QUEUE: each + (nth < more)} for nth in range(scene.workers)]


def rules_of(scene: Scene) -> Rules:
    """Return the limits that hold: none, or one on each provider."""
    if not scene.keys:
        return Rules()
    most = max(1, scene.slots // PROVIDERS)
    return Rules.of([Rule(owner=0, key=parse_key("provider:*"), kind="concurrency", maximum=most)])


def load_of(scene: Scene) -> Load:
    """Draw runs: Poisson arrivals, exponential durations; the first orgs are the noisy ones."""
    dice = random.Random(scene.seed)
    load = Load(
        works=[
            Work(
                org_id=org_id,
                queue=QUEUE,
                capability="flow@1",
                keys=(f"provider:{org_id % PROVIDERS}",) if scene.keys else (),
            )
            for org_id in range(1, scene.orgs + 1)
        ]
    )
    parts = [scene.noise if nth < scene.noisy else 1.0 for nth in range(scene.orgs)]
    per_s = scene.load * scene.slots / scene.mean_s
    senders = dice.choices(range(scene.orgs), weights=parts, k=scene.runs)
    at_s = 0.0
    for nth in senders:
        at_s += dice.expovariate(per_s)
        load.add(at_s, dice.expovariate(1 / scene.mean_s), nth)
    return load


def in_one_line(load: Load) -> Load:
    """Return the same runs as one org's: then they go first come, first served."""
    return replace(load, works=[replace(one, org_id=0) for one in load.works])


def groups(scene: Scene, found: Figures) -> dict[str, list[OrgFigures]]:
    """Part orgs into noisy and quiet ones."""
    return {
        "noisy": [one for one in found.orgs if one.org_id <= scene.noisy],
        "quiet": [one for one in found.orgs if one.org_id > scene.noisy],
    }


def lines(name: str, scene: Scene, load: Load, outcome: Outcome, found: Figures) -> list[str]:
    """Return a simulation as lines of text."""
    used = found.slots_share[QUEUE]
    times = f"runs arrived for {found.arrivals_s:,.0f} s and were done after {found.until_s:,.0f} s"
    shown = [f"{name}: Jain's index {found.jain:.4f}, slots used {used:.1%}, {times}"]
    for group, members in groups(scene, found).items():
        if not members:
            continue
        ids = {one.org_id for one in members}
        waited = sorted(
            start_s - at_s
            for at_s, start_s, work in zip(load.at_s, outcome.starts_s, load.work, strict=True)
            if load.works[work].org_id in ids and start_s == start_s
        )
        one = waits(waited, sum(member.waits.never for member in members))
        share = sum(member.share for member in members)
        shown.append(
            f"  {len(members):>6,} {group} orgs  {one.runs:>9,} runs  {share:>6.1%} of worker time   wait p50"
            f" {one.p50_s:,.2f} s  p95 {one.p95_s:,.2f}  p99 {one.p99_s:,.2f}  max {one.max_s:,.2f}"
        )
    if found.rooms:
        full = [room.full_share for room in found.rooms]
        shown.append(
            f"  {len(full)} limits, full for {min(full):.1%} to {max(full):.1%} of the time"
        )
    return shown


def measure(scene: Scene, load: Load) -> Iterator[tuple[str, Outcome, Figures, float]]:
    """Simulate in fair order, then in one line; yields name, outcome, figures and how many seconds it took."""
    workers, weights = workers_of(scene), weights_of(scene)
    for name, given in (("fair order", load), ("one line", in_one_line(load))):
        began = time.perf_counter()
        outcome = simulate(given, workers, rules=rules_of(scene), weights=weights)
        took_s = time.perf_counter() - began
        yield name, outcome, figures(load, outcome, workers, weights=weights), took_s


def plain(found: Figures) -> dict[str, object]:
    """Return figures as JSON has them, limits by the text of their room."""
    rooms = [{**asdict(one), "room": one.room.text} for one in found.rooms]
    return {**asdict(found), "rooms": rooms}


def parse(arguments: Sequence[str] | None = None) -> tuple[Scene, Path]:
    """Read the command line."""
    usual = Scene()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orgs", type=int, default=usual.orgs)
    parser.add_argument("--runs", type=int, default=usual.runs)
    parser.add_argument("--slots", type=int, default=usual.slots)
    parser.add_argument("--workers", type=int, default=usual.workers)
    parser.add_argument(
        "--load", type=float, default=usual.load, help="work over slots; above 1 it piles up"
    )
    parser.add_argument("--noisy", type=int, default=usual.noisy, help="orgs that send more")
    parser.add_argument("--noise", type=float, default=usual.noise, help="so many times as much")
    parser.add_argument("--mean-s", type=float, default=usual.mean_s, help="mean duration of a run")
    parser.add_argument("--keys", action="store_true", help="each run uses a limited provider")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--out", type=Path, default=OUT / "simulate.json")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    return Scene(**given), out


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print and store."""
    scene, out = parse(arguments)
    load = load_of(scene)
    stored = {}
    for name, outcome, found, took_s in measure(scene, load):
        print("\n".join(lines(name, scene, load, outcome, found)))
        print(
            f"  {took_s:,.1f} s on one core, {len(load) / took_s:,.0f} runs/s, {outcome.claims:,} claims",
            flush=True,
        )
        stored[name] = {"took_s": took_s, "claims": outcome.claims, **plain(found)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(
        orjson.dumps({"scene": asdict(scene), "simulations": stored}, option=orjson.OPT_INDENT_2)
    )


if __name__ == "__main__":
    main()
