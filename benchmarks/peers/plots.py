"""Plots: the figures of a run as pictures for the docs.

Run by `.venv-peers/bin/python -m benchmarks.peers.plots [FILE …] [--to FOLDER]`: draws what the files (by default
`benchmarks/out/latest.json`) have figures for into `docs/plots`. Invariant: nothing is drawn that was not measured;
what a chart lacks is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import orjson
from matplotlib import pyplot

from benchmarks import bar
from benchmarks.bar import Bar
from benchmarks.figures import OURS, OUT, Figure

_FOLDER = Path("docs/plots")
_OURS, _THEIRS, _TAIL, _LINE = "#1f6f8b", "#9aa5ad", "#d9822b", "#333333"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Bars of one suite, a group for each system (or, `by_figure`, for each figure); `names` maps figures to labels."""

    file: str
    title: str
    suite: str
    names: dict[str, str]
    unit: str
    is_log: bool = False
    by_figure: bool = False


CHARTS = (
    Chart(
        file="drain.svg",
        title="Drain of no-op runs, one worker process",
        suite="drain",
        names={bar.DRAIN: "runs/s"},
        unit="runs/s",
    ),
    Chart(
        file="steps.svg",
        title="Three durable steps, one worker process",
        suite="steps",
        names={bar.STEPS: "runs/s"},
        unit="runs/s",
        is_log=True,
    ),
    Chart(
        file="idle.svg",
        title="Idle dispatch: from before the submit to the first line of the handler",
        suite="idle",
        names={bar.IDLE_P50: "p50", bar.IDLE_P99: "p99"},
        unit="ms",
        is_log=True,
    ),
    Chart(
        file="noisy.svg",
        title="Noisy neighbour: B's wait while A has 3,000 runs of 20 ms queued on 20 slots",
        suite="noisy",
        names={bar.NOISY_P50: "p50", bar.NOISY_P99: "p99"},
        unit="ms",
        is_log=True,
    ),
    Chart(
        file="limits.svg",
        title="Drain by the number of limited keys on every run",
        suite="limits",
        names={
            "drain, 0 limited keys": "0",
            "drain, 1 limited key": "1",
            "drain, 3 limited keys": "3",
            "drain, 6 limited keys": "6",
        },
        unit="runs/s",
        by_figure=True,
    ),
    Chart(
        file="accept.svg",
        title="Accept over HTTP, one API process, 32 connections",
        suite="accept",
        names={f"{bar.ACCEPT}, p50": "p50", f"{bar.ACCEPT}, p99": "p99"},
        unit="ms",
    ),
)


def read(paths: Iterable[Path]) -> list[Figure]:
    """Read figures; of one that several files have, the last is taken."""
    found = {}
    for path in paths:
        for one in orjson.loads(path.read_bytes()):
            found[one["suite"], one["system"], one["figure"]] = Figure(**one)
    return list(found.values())


def draw(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Draw every chart that there are figures for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [path for chart in CHARTS if (path := _bars(chart, figures, folder))]
    barred = [(one, of) for one in bar.BARS for of in figures if one.fits(of)]
    if barred:
        drawn.append(_ratios(barred, folder))
    return drawn


def _bars(chart: Chart, figures: Sequence[Figure], folder: Path) -> Path | None:
    mine = [one for one in figures if one.suite == chart.suite and one.figure in chart.names]
    mine = [one for one in mine if " / " not in one.system]
    if not mine:
        return None
    systems = list(dict.fromkeys(one.system for one in mine))
    groups = list(chart.names.values()) if chart.by_figure else systems
    series = systems if chart.by_figure else list(chart.names.values())
    values = {
        (one.system, chart.names[one.figure])[:: -1 if chart.by_figure else 1]: one for one in mine
    }
    figure, axes = pyplot.subplots(figsize=(7.2, 0.5 + 0.42 * len(groups) * max(1, len(series))))
    thick = 0.8 / len(series)
    for nth, name in enumerate(series):
        for at, group in enumerate(groups):
            one = values.get((group, name))
            if one is None:
                continue
            place = at + (nth - (len(series) - 1) / 2) * thick
            color = _TAIL if nth else (_OURS if OURS in (group, name) else _THEIRS)
            spread = [[one.median - min(one.runs)], [max(one.runs) - one.median]]
            axes.barh(place, one.median, thick * 0.9, color=color, xerr=spread, ecolor=_LINE)
            tail = f" {name}" if len(series) > 1 else ""
            axes.annotate(
                f"{one.median:,.3g}{tail}" if one.median < 100 else f"{one.median:,.0f}{tail}",
                (max(one.runs), place),
                textcoords="offset points",
                xytext=(4, 0),
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlabel(f"{chart.unit}; bars: medians, lines: lowest to highest")
    if chart.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.18)
    axes.set_title(chart.title, fontsize=10, loc="left")
    return _store(figure, folder / chart.file)


def _ratios(barred: Sequence[tuple[Bar, Figure]], folder: Path) -> Path:
    """Draw each figure over its bar, so that right of 1 is better than asked."""
    figure, axes = pyplot.subplots(figsize=(7.2, 0.8 + 0.34 * len(barred)))
    labels = []
    for at, (one, of) in enumerate(barred):
        over = [value / one.bound for value in (min(of.runs), of.median, max(of.runs))]
        low, middle, high = over if one.side == "least" else [1 / value for value in over[::-1]]
        color = _OURS if one.verdict(of.median) == "pass" else _TAIL
        axes.plot([low, high], [at, at], color=color, linewidth=2)
        axes.plot([middle], [at], "o", color=color)
        against = "" if of.system == OURS else f", {of.system.removeprefix(f'{OURS} / ')}"
        labels.append(f"{of.figure}{against} ({one.text()})")
    axes.axvline(1.0, color=_LINE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("how much better than its bar (1: just reached); dots: medians, lines: spread")
    axes.set_title("Figures over their bars", fontsize=10, loc="left")
    return _store(figure, folder / "bars.svg")


def _store(figure: pyplot.Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=[OUT / "latest.json"])
    parser.add_argument("--to", type=Path, default=_FOLDER)
    given = parser.parse_args()
    matplotlib.use("svg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "millpond"})
    for path in draw(read(given.files), given.to):
        print(path)


if __name__ == "__main__":
    main()
