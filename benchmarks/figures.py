"""Figures: what was measured, how it is summed up, and how it is printed and stored.

Called by `quick`, `compare` and every suite; pure but for `store`. Invariant: a figure keeps every run
behind its median, and nothing is rounded before it is stored.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

OURS = "millpond"
OUT = Path("benchmarks/out")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure: its median and every run behind it.

    `system` is who was measured; for a ratio of two systems it is `ours / peer`, with unit `x`.
    """

    suite: str
    system: str
    figure: str
    unit: str
    median: float
    runs: Sequence[float]

    @classmethod
    def of(
        cls, suite: str, figure: str, unit: str, runs: Sequence[float], system: str = OURS
    ) -> Figure:
        """Make a figure from its runs."""
        return cls(
            suite=suite,
            system=system,
            figure=figure,
            unit=unit,
            median=statistics.median(runs),
            runs=list(runs),
        )

    def line(self) -> str:
        """Return the figure as a line of text with its spread."""
        low, high = min(self.runs), max(self.runs)
        return (
            f"{self.figure:<50} {self.system:<20}{self.median:>12,.2f} {self.unit:<7}"
            f" ({low:,.2f} to {high:,.2f})"
        )


class Notes:
    """Runs of figures as they come in, in the order in which each figure was first seen."""

    def __init__(self, suite: str) -> None:
        self._suite = suite
        self._runs: dict[tuple[str, str, str], list[float]] = {}

    def add(self, figure: str, unit: str, value: float, system: str = OURS) -> None:
        """Note one run of a figure and print it."""
        self._runs.setdefault((system, figure, unit), []).append(value)
        print(f"  {system:<22} {figure}: {value:,.2f} {unit}", flush=True)

    def figures(self) -> list[Figure]:
        """Return a figure for each that was noted."""
        return [
            Figure.of(self._suite, figure, unit, runs, system)
            for (system, figure, unit), runs in self._runs.items()
        ]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


def store(figures: Sequence[Figure], folder: Path = OUT) -> Path:
    """Write the figures as JSON to `latest.json` in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "latest.json"
    raw = orjson.dumps([asdict(figure) for figure in figures], option=orjson.OPT_INDENT_2)
    path.write_bytes(raw + b"\n")
    return path
