"""The benchmarks work, whatever they measure here: options, shape of the result, every suite once, tiny.

No peers and no judgement of times: those need a quiet machine, `make bench`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import replace

import pytest
from benchmarks import bar, compare, quick, sealing
from benchmarks.figures import OURS, Figure, percentile, store
from benchmarks.plan import Plan
from benchmarks.suites import accept, features, pairs
from benchmarks.systems import SYSTEMS

TINY = Plan(rounds=1, seconds=0.5, depth=60, waiting=10, orgs=3, scale=0.001, systems=[OURS])
MEMBERS = {"suite", "system", "figure", "unit", "median", "runs"}


@pytest.fixture(autouse=True)
def place(monkeypatch, root, folder_of_module):
    """Run from the repository's root, with the servers where those of all tests are."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("benchmarks.ground.PLACE", folder_of_module)


def test_every_module_of_the_benchmarks_can_be_imported(root):
    paths = [path for path in (root / "benchmarks").rglob("*.py") if "peers" not in path.parts]
    assert len(paths) > 15
    for path in paths:
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def test_every_system_has_a_driver_that_answers_the_orders_it_is_given(root):
    assert set(SYSTEMS) == {OURS, "dbos", "pgqueuer", "celery", "bullmq"}
    for system in SYSTEMS.values():
        assert set(system.counts) <= set(pairs.SUITES)
        name = f"peers/{system.name}_driver" if system.name != OURS else "driver"
        (driver,) = (root / "benchmarks").glob(f"{name}.*")
        text = driver.read_text(encoding="utf-8")
        if driver.suffix == ".py":
            ast.parse(text)
        for order in system.counts:
            assert re.search(rf"\b{order}\b", text), f"{driver.name}: {order}"


def test_the_peers_are_pinned_without_addresses(root):
    lines = (root / "benchmarks/peers/requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins)
    assert {"dbos", "pgqueuer", "celery"} <= {line.partition("==")[0] for line in pins}
    package = json.loads((root / "benchmarks/peers/package.json").read_text(encoding="utf-8"))
    assert all(re.fullmatch(r"[\d.]+", version) for version in package["dependencies"].values())
    assert "bullmq" in package["dependencies"]


def test_the_command_line_names_suites_and_systems():
    options = compare.parse(["--only", "drain,backlog", "--systems", "dbos", "--rounds", "2"])
    assert (options.only, options.systems, options.rounds) == (["drain", "backlog"], ["dbos"], 2)
    assert compare.plan_of(compare.parse([])).rounds_or(5) == 5
    assert set(compare.parse([]).only) < set(compare.SUITES)
    assert quick.parse(["--scale", "0.5"]).scale == 0.5
    chosen = compare.parse(["--features", "no metering", "a child run, awaited", "--rounds", "1"])
    assert compare.plan_of(chosen).features == ["no metering", "a child run, awaited"]


@pytest.mark.parametrize(
    "words", [["--only", "dran"], ["--systems", "kafka"], ["--rounds", "x"], ["--features", "none"]]
)
def test_what_the_command_line_does_not_know_is_refused(words):
    with pytest.raises(SystemExit):
        compare.parse(words)


def test_figures_are_stored_with_every_run_behind_them(tmp_path):
    figure = Figure.of("drain", bar.DRAIN, "x", [3.0, 1.0, 2.0], bar.over("dbos"))
    (stored,) = json.loads(store([figure], tmp_path).read_bytes())
    assert stored == {
        "suite": "drain",
        "system": "millpond / dbos",
        "figure": "drain of no-op runs",
        "unit": "x",
        "median": 2.0,
        "runs": [3.0, 1.0, 2.0],
    }


def test_a_percentile_is_one_of_the_values():
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (
        51,
        100,
        7,
    )


@pytest.mark.parametrize(
    ("median", "verdict"), [(1.0, "pass"), (0.9, "near"), (0.8, "near"), (0.79, "below")]
)
def test_a_ratio_below_its_bar_is_marked(median, verdict):
    figure = Figure.of("drain", bar.DRAIN, "x", [median], bar.over("pgqueuer"))
    found = bar.bar_of(figure)
    assert found is not None
    assert found.verdict(median) == verdict
    assert re.search(rf"≥ 1 +{verdict}", bar.table([figure]))


def test_a_bar_may_also_be_an_upper_bound():
    figure = Figure.of("submit", bar.SUBMIT_RATIO, "x", [2.6, 2.4, 2.7])
    found = bar.bar_of(figure)
    assert found is not None
    assert (found.verdict(2.6), found.verdict(2.5)) == ("below", "pass")


def test_a_bar_on_a_pair_names_what_is_compared():
    on_pairs = [one for one in bar.BARS if one.suite in pairs.SUITES and one.system != OURS]
    assert len(on_pairs) == 8
    assert {one.figure for one in on_pairs} <= pairs.COMPARED
    assert {one.system for one in on_pairs} <= {bar.over(name) for name in SYSTEMS}
    assert [one.system for one in bar.BARS if one.suite == "accept"] == [bar.over(bar.BARE)] * 3


def check(figures: list[Figure], suites: set[str]) -> None:
    """Assert the promised shape, and that every bar of these suites has its figure."""
    for figure in figures:
        assert set(vars(figure)) == MEMBERS
        assert figure.suite in suites
        assert figure.runs
        assert min(figure.runs) <= figure.median <= max(figure.runs)
    for one in bar.BARS:
        if one.suite in suites and (one.system == OURS or one.suite not in pairs.SUITES):
            assert [figure for figure in figures if one.fits(figure)], one.figure


async def test_pairs_without_peers_measure_millpond_alone():
    figures, left_out = await compare.measure(TINY, pairs.SUITES)
    check(figures, set(pairs.SUITES))
    assert {figure.suite for figure in figures} == set(pairs.SUITES)
    assert {figure.system for figure in figures} == {OURS}
    assert left_out == {}


async def test_a_peer_that_cannot_be_had_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("benchmarks.systems.shutil.which", lambda name: None)
    _, left_out = await pairs.measure(Plan(rounds=0), ["drain"])
    assert set(left_out) == set(SYSTEMS) - {OURS}
    assert "redis-server is not installed" in left_out["celery"]
    assert "scripts/peers" in left_out["dbos"]


@pytest.mark.slow
@pytest.mark.parametrize("suite", compare.OWN)
async def test_a_suite_of_our_own_runs_and_has_the_figures_of_its_bars(suite):
    figures, _ = await compare.measure(TINY, [suite])
    check(figures, {suite})
    assert OURS in {figure.system for figure in figures}


async def test_the_quick_benchmark_runs():
    figures = await quick.measure(1, set(), 0.001)
    check(figures, {"quick"})
    assert len({figure.figure for figure in figures}) == 10


async def test_sealing_measures_every_row_that_was_told():
    figures = {one.figure: one.median for one in await sealing.measure(3, 20.0, 0.5, 600)}
    assert figures["rows told"] == 10
    assert 0 < figures["wait for a seal, median"] <= figures["wait for a seal, longest"]
    assert figures["accepted beside it"] > 0


@pytest.mark.slow
async def test_an_api_without_limits_is_not_measured_as_one_with_them(monkeypatch):
    monkeypatch.setattr("benchmarks.doors.LIMITS", {"requests_per_s": 10**6})
    with pytest.raises(RuntimeError, match="not paid for"):
        await accept.measure(TINY)


async def test_only_the_features_that_were_chosen_are_measured():
    chosen = replace(TINY, features=["no metering"])
    figures = {one.figure for one in await features.measure(chosen)}
    assert figures == {
        "drain, plain",
        "drain, no metering",
        "no metering, added per run",
        "no metering, share of the plain rate",
    }
