"""The bar: what each figure has to reach, and whether it did.

Read by `compare` when it prints. Pure. Invariant: a bar names a figure of `latest.json` exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.figures import OURS, Figure


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bound on the median of one figure; `floor` is what is let pass with the costs told."""

    suite: str
    figure: str
    bound: float
    side: Literal["least", "most"] = "least"
    system: str = OURS
    floor: float | None = None

    def fits(self, figure: Figure) -> bool:
        """Whether this bar is on that figure."""
        mine = (self.suite, self.figure, self.system)
        return mine == (figure.suite, figure.figure, figure.system)

    def verdict(self, median: float) -> str:
        """Return `pass`, `near` (between floor and bound) or `below`."""
        if (median >= self.bound) if self.side == "least" else (median <= self.bound):
            return "pass"
        if self.floor is not None and median >= self.floor:
            return "near"
        return "below"

    def text(self) -> str:
        """Return the bound as it is printed."""
        return f"{'≥' if self.side == 'least' else '≤'} {self.bound:g}"


def over(peer: str) -> str:
    """Name the system of a ratio of ours to a peer's."""
    return f"{OURS} / {peer}"


def limited(keys: str) -> str:
    """Name the ratio of a drain with so many limited keys on every run to one with a single one."""
    return f"{keys} over one"


DRAIN = "drain of no-op runs"
STEPS = "three durable steps"
IDLE_P50 = "idle dispatch, p50"
IDLE_P99 = "idle dispatch, p99"
SUBMIT_P50 = "submit, one at a time, p50"
SUBMIT_P99 = "submit, one at a time, p99"
SUBMIT_RATIO = "submit p50 over a one-row commit"
BULK = "submit in bulk"
NOISY_P50 = "B's wait, p50"
NOISY_P99 = "B's wait, p99"
NOISY_RUNS = "B's wait p99 over one of A's runs"
NOISY_BESIDE = "A's rate, with B"
NOISY_ALONE = "A's rate, without B"
NOISY_KEPT = "A's rate with B over without"
NOISY_LONG_P99 = "B's wait beside runs of 1 to 3 s, p99"
NOISY_GAP = "long against short runs, difference over bound"
AT_ONCE = "most at once over the limit, four processes"
BLOCKED_RATE = "drain beside blocked lanes over drain without"
BLOCKED_CLAIM = "claim p99, beside blocked lanes over without"
RETENTION_RATE = "drain beside retention over drain without"
RETENTION_CLAIM = "claim p99, beside retention over without"
BARE = "bare endpoint"
ACCEPT = "accept over HTTP"
ACCEPT_BESIDE = "accept over HTTP beside a drain"

BARS = (
    Bar(suite="drain", figure=DRAIN, system=over("pgqueuer"), bound=1.0, floor=0.8),
    Bar(suite="drain", figure=DRAIN, system=over("bullmq"), bound=1.2),
    Bar(suite="drain", figure=DRAIN, system=over("dbos"), bound=12),
    Bar(suite="drain", figure=DRAIN, system=over("celery"), bound=12),
    Bar(suite="steps", figure=STEPS, system=over("dbos"), bound=50),
    Bar(suite="steps", figure=STEPS, system=over("bullmq"), bound=1.5),
    Bar(suite="submit", figure=SUBMIT_RATIO, bound=2.5, side="most"),
    Bar(suite="idle", figure=IDLE_P50, system=over("celery"), bound=1.0, side="most"),
    Bar(suite="idle", figure=IDLE_P99, system=over("pgqueuer"), bound=1.0, side="most"),
    Bar(suite="noisy", figure=NOISY_RUNS, bound=2.0, side="most"),
    Bar(suite="noisy", figure=NOISY_KEPT, bound=0.9),
    Bar(suite="noisy", figure=NOISY_LONG_P99, bound=600, side="most"),
    Bar(suite="noisy", figure=NOISY_GAP, bound=1.0, side="most"),
    Bar(suite="accept", figure=f"{ACCEPT}, rate", system=over(BARE), bound=0.6),
    Bar(suite="accept", figure=f"{ACCEPT}, p99", system=over(BARE), bound=2.0, side="most"),
    Bar(suite="accept", figure=f"{ACCEPT_BESIDE}, p99", system=over(BARE), bound=4.0, side="most"),
    Bar(suite="tenants", figure="many orgs over one", bound=0.8),
    Bar(suite="limits", figure=limited("3 limited keys"), bound=0.8),
    Bar(suite="blocked", figure=BLOCKED_RATE, bound=0.85),
    Bar(suite="blocked", figure=BLOCKED_CLAIM, bound=2.0, side="most"),
    Bar(suite="backlog", figure="deep over shallow", bound=0.8),
    Bar(suite="backlog", figure="claim p99, deep over shallow", bound=2.0, side="most"),
    Bar(suite="steadiness", figure="last over first", bound=0.9),
    Bar(suite="steadiness", figure="last over first, beside an open transaction", bound=0.7),
    Bar(suite="waiting", figure="drain beside waiting runs over drain without", bound=0.95),
    Bar(suite="retention", figure=RETENTION_RATE, bound=0.9),
    Bar(suite="retention", figure=RETENTION_CLAIM, bound=2.0, side="most"),
    Bar(suite="rls", figure="with row-level security over without", bound=0.9),
    Bar(suite="scale", figure="two processes over one", bound=1.5),
    Bar(suite="scale", figure=AT_ONCE, bound=1.0, side="most"),
    Bar(suite="features", figure="three keys, share of the plain rate", bound=0.8),
)


def bar_of(figure: Figure) -> Bar | None:
    """Return the bar on a figure, if it has one."""
    return next((bar for bar in BARS if bar.fits(figure)), None)


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as text: measured values first, then ratios, and values that have a bar, with it."""
    lines = [figure.line() for figure in figures if figure.unit != "x"]
    ratios = [figure for figure in figures if figure.unit == "x" or bar_of(figure)]
    if ratios:
        lines += ["", f"{'ratio, median of its pairs':<71}{'median':>12} {'bar':<7} mark   spread"]
    for figure in ratios:
        bar = bar_of(figure)
        bound, mark = (bar.text(), bar.verdict(figure.median)) if bar else ("", "")
        lines.append(
            f"{figure.figure:<50} {figure.system:<20}{figure.median:>12,.2f} {bound:<7} {mark:<6} "
            f"({min(figure.runs):,.2f} to {max(figure.runs):,.2f})"
        )
    return "\n".join(lines)
