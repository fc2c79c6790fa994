"""The benchmarks work, whatever they measure here: options, shape of the result, every suite once, tiny.

No peers and no judgement of times: those need a quiet machine, `make bench`.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from benchmarks import bar, compare, ground, neighbours, quick, sealing
from benchmarks.figures import OURS, Figure, percentile, store
from benchmarks.flows import Nap, nap
from benchmarks.ground import PAYLOAD, Server
from benchmarks.peers import wire
from benchmarks.plan import Plan
from benchmarks.suites import accept, blocked_lanes, features, pairs
from benchmarks.systems import SYSTEMS

from millpond.db.embedded import DATABASE
from millpond.engine.limiting import Limiter
from millpond.engine.registry import Flow
from millpond.types import Intent

TINY = Plan(rounds=1, seconds=0.5, depth=60, waiting=10, orgs=3, scale=0.001, systems=[OURS])
MEMBERS = {"suite", "system", "figure", "unit", "median", "runs"}


@pytest.fixture(autouse=True)
def place(monkeypatch, root, folder_of_module):
    """Run from the repository's root, with the servers where those of all tests are."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("benchmarks.ground.PLACE", folder_of_module)


@pytest.fixture
def shared(monkeypatch, server):
    """Let every ground be a fresh database of the tests' own server: to start one takes longer than most suites.

    Suites that change roles, which all databases share, open a server of their own.
    """

    @asynccontextmanager
    async def postgres():
        name = f"bench_{uuid.uuid4().hex[:12]}"
        beside = server.urls("postgres")
        owner, boss = Server(beside, beside.owner), Server(beside, server.admin_url("postgres"))
        await owner.alter(f"create database {name} template {DATABASE} strategy file_copy")
        try:
            yield Server(server.urls(name), server.admin_url(name))
        finally:
            await boss.alter(f"drop database {name} with (force)")

    monkeypatch.setattr(ground, "postgres", postgres)


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


def test_a_value_that_is_no_ratio_may_have_a_bar():
    figure = Figure.of("noisy", bar.NOISY_LONG_P99, "ms", [650.0])
    values, _, judged = bar.table([figure]).partition("\n\n")
    assert "650.00 ms" in values
    assert re.search(r"650\.00 ≤ 600 +below", judged)


def naps(*times: tuple[int, float, float]) -> list[Nap]:
    """Make rests of orgs."""
    return [
        Nap(org_id=org_id, run_id=uuid.uuid4(), began=began, ended=ended)
        for org_id, began, ended in times
    ]


def intent_of(flow: Flow) -> Intent:
    """Make an intent without a database."""
    return Intent(
        org_id=1, flow=flow.name, version=1, queue=flow.queue, input=b"{}", subject="user:bench"
    )


def test_worker_time_counts_what_lies_between_two_times():
    rested = naps((1, 0.0, 2.0), (1, 3.0, 9.0), (2, 4.5, 4.75), (3, 5.0, 6.0))
    used = neighbours.worker_seconds(rested, 1.0, 5.0)
    assert used == {1: 3.0, 2: 0.25, 3: 0.0}


def test_jains_index_is_one_for_equal_shares_and_falls_to_one_in_n():
    assert neighbours.jain({1: 2.0, 2: 2.0, 3: 2.0}) == pytest.approx(1.0)
    assert neighbours.jain({1: 5.0, 2: 0.0, 3: 0.0, 4: 0.0}) == pytest.approx(0.25)


def test_a_visit_waits_from_its_submit_to_its_first_line_and_others_are_not_counted():
    host, guest, _ = rested = naps((1, 10.0, 10.5), (2, 10.25, 10.5), (1, 10.5, 11.0))
    shared = neighbours.Shared(rested, {guest.run_id: 10.0})
    assert shared.waits() == [0.25]
    assert shared.span(host.org_id) == 1.0


def test_runs_that_rest_have_an_input_as_big_as_all_others():
    intent = neighbours.resting(lambda nth: nth / 3)(intent_of(nap), 5)
    assert len(intent.input) == len(PAYLOAD) == len(wire.PAYLOAD)
    assert nap.input.validate_json(intent.input).rest_s == pytest.approx(5 / 3)


def test_a_peer_answers_with_the_waits_of_b_and_the_time_that_a_took():
    beside = {"a0": (1.0, 1.5), "b0": (2.0, 2.5), "a1": (2.5, 3.0)}
    answer = wire.noisy(beside, {"a0": (5.0, 6.0)}, {"b0": 1.5})
    assert answer == {"took_s": [0.5], "beside_s": 2.0, "alone_s": 1.0}
    found = pairs.read("noisy", 10, answer)
    assert found[bar.NOISY_P99] == ("ms", 500.0)
    assert found[bar.NOISY_RUNS] == ("x", 0.5 / wire.NAP_S)
    assert found[bar.NOISY_KEPT] == ("x", 0.5)
    assert (found[bar.NOISY_BESIDE][1], found[bar.NOISY_ALONE][1]) == (5.0, 10.0)


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
    # `noisy` has a part of our own, and is measured whole below.
    suites = [suite for suite in pairs.SUITES if suite not in compare.OWN]
    figures, left_out = await compare.measure(TINY, suites)
    check(figures, set(suites))
    assert {figure.suite for figure in figures} == set(suites)
    assert {figure.system for figure in figures} == {OURS}
    assert left_out == {}


async def test_a_peer_that_cannot_be_had_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("benchmarks.systems.shutil.which", lambda name: None)
    _, left_out = await pairs.measure(Plan(rounds=0), ["drain"])
    assert set(left_out) == set(SYSTEMS) - {OURS}
    assert "redis-server is not installed" in left_out["celery"]
    assert "scripts/peers" in left_out["dbos"]


async def measured(suite):
    """Measure a suite of our own and hold it against what all of them promise; returns its figures by title."""
    figures, _ = await compare.measure(TINY, [suite])
    check(figures, {suite})
    assert OURS in {figure.system for figure in figures}
    return {figure.figure: figure for figure in figures}


@pytest.mark.slow
@pytest.mark.parametrize("suite", [one for one in compare.OWN if one not in ("blocked", "limits")])
async def test_a_suite_of_our_own_runs_and_has_the_figures_of_its_bars(
    suite, shared, short_of_slots
):
    await measured(suite)


@pytest.mark.slow
async def test_lanes_are_blocked_throughout(shared):
    figures = await measured("blocked")
    assert figures["lanes still parked at the end"].runs == [TINY.runs(blocked_lanes.LANES)]


@pytest.mark.slow
async def test_what_is_measured_of_limits_is_that_many_on_every_run(monkeypatch, shared):
    met = set()
    rooms = Limiter.rooms

    def meet(self, row):
        found = rooms(self, row)
        met.add(len(found))
        return found

    monkeypatch.setattr(Limiter, "rooms", meet)
    await measured("limits")
    assert met - {0} == {1, 3, 6}


async def test_the_quick_benchmark_runs():
    figures = await quick.measure(1, set(), 0.001)
    check(figures, {"quick"})
    assert len({figure.figure for figure in figures}) == 10


async def test_sealing_measures_every_row_that_was_told(shared):
    figures = {one.figure: one.median for one in await sealing.measure(3, 20.0, 0.5, 600)}
    assert figures["rows told"] == 10
    assert 0 < figures["wait for a seal, median"] <= figures["wait for a seal, longest"]
    assert figures["accepted beside it"] > 0


@pytest.fixture
def short_of_slots(monkeypatch):
    """Let a worker beside a load drain slowly, so that a small backlog outlasts it."""
    worker_process = accept.worker_process
    monkeypatch.setattr(accept, "worker_process", lambda urls, _: worker_process(urls, 2))
    monkeypatch.setattr(accept, "BACKLOG_PER_S", 4_000)


@pytest.mark.slow
async def test_an_api_without_limits_is_not_measured_as_one_with_them(monkeypatch, shared):
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
