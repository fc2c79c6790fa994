"""Properties of the simulation: it goes through the product's admission, keeps slots and limits, and shares fairly."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from benchmarks.simulate import QUEUE, Scene, in_one_line, load_of, rules_of, weights_of, workers_of
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.charges import EVERY_S
from millpond.engine.keying import parse_key
from millpond.engine.loads import Load, Outcome, Work
from millpond.engine.rules import Kind, Rule, Rules
from millpond.engine.simulated import figures, jain, max_min, waits
from millpond.engine.simulating import simulate
from millpond.engine.spilling import Spill
from millpond.engine.tokens import Used

NOISY = Scene(orgs=60, runs=12_000, slots=16, workers=2, load=1.5, noisy=3, noise=30.0, seed=7)


def _rule(key: str, maximum: int, kind: Kind = "concurrency") -> Rule:
    is_rate = kind == "rate"
    return Rule(
        owner=0,
        key=parse_key(key),
        kind=kind,
        maximum=maximum,
        period_s=10.0 if is_rate else None,
        burst=2 if is_rate else None,
    )


def _load(runs: list[tuple[float, float, Work]]) -> Load:
    load = Load()
    numbers: dict[Work, int] = {}
    for at_s, service_s, work in sorted(runs, key=lambda run: run[0]):
        if work not in numbers:
            numbers[work] = len(load.works)
            load.works.append(work)
        load.add(at_s, service_s, numbers[work])
    return load


works = st.builds(
    Work,
    org_id=st.integers(1, 4),
    queue=st.sampled_from(["default", "llm"]),
    capability=st.sampled_from(["a@1", "b@1"]),
    keys=st.frozensets(st.sampled_from(["provider:x", "provider:y", "model:m"])).map(
        lambda keys: tuple(sorted(keys))
    ),
    priority=st.sampled_from([0, 5]),
)
loads = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda tenth: tenth / 10), st.sampled_from([0.0, 0.3, 4.0]), works
    ),
    min_size=1,
    max_size=40,
).map(_load)
limits = st.lists(
    st.one_of(
        st.builds(
            _rule,
            st.sampled_from(
                ["provider:*", "provider:x", "org:*", "org:* x model:m", "queue:llm", "flow:a"]
            ),
            st.integers(1, 3),
        ),
        st.builds(_rule, st.just("provider:y"), st.integers(1, 20), st.just("rate")),
    ),
    max_size=4,
)


def _most_at_once(load: Load, outcome: Outcome, of: Mapping[Work, bool]) -> int:
    """Return how many runs of some works went on at once at most; an end counts before a start at its time."""
    moments = []
    for start_s, service_s, work in zip(outcome.starts_s, load.service_s, load.work, strict=True):
        if of[load.works[work]] and service_s > 0:
            moments += [(start_s, 1), (start_s + service_s, -1)]
    most = at_once = 0
    for _, change in sorted(moments):
        at_once += change
        most = max(most, at_once)
    return most


@settings(max_examples=200, deadline=None)
@given(loads, limits, st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_every_run_begins_and_no_limit_is_passed(
    load: Load, rules: list[Rule], slots: list[int]
) -> None:
    held = Rules.of(rules)
    workers = [{"default": one, "llm": one} for one in slots]
    outcome = simulate(load, workers, rules=held)
    assert not any(math.isnan(start_s) for start_s in outcome.starts_s)
    assert all(start >= at for start, at in zip(outcome.starts_s, load.at_s, strict=True))
    places = {
        one: held.places(one.org_id, one.queue, one.capability, one.keys) for one in load.works
    }
    for queue in ("default", "llm"):
        of = {one: one.queue == queue for one in load.works}
        assert _most_at_once(load, outcome, of) <= sum(slots)
    for place in {place for found in places.values() for place in found}:
        of = {one: place in found for one, found in places.items()}
        if place.rule.kind == "concurrency":
            assert _most_at_once(load, outcome, of) <= place.rule.maximum
            assert outcome.most_in_use[place.room] <= place.rule.maximum
            continue
        began = sorted(
            start_s
            for start_s, work in zip(outcome.starts_s, load.work, strict=True)
            if of[load.works[work]]
        )
        for nth, first_s in enumerate(began):
            for more, last_s in enumerate(began[nth:]):
                window_us = (last_s - first_s) * 1e6
                assert more + 1 <= window_us / place.rule.interval_us + 2 + 1e-3


@settings(max_examples=50, deadline=None)
@given(loads, limits)
def test_the_same_load_gives_the_same_starts(load: Load, rules: list[Rule]) -> None:
    workers = [{"default": 2, "llm": 1}, {"default": 1, "llm": 1}]
    first = simulate(load, workers, rules=Rules.of(rules))
    assert list(simulate(load, workers, rules=Rules.of(rules)).starts_s) == list(first.starts_s)


@settings(max_examples=100, deadline=None)
@given(loads)
def test_no_slot_is_idle_while_work_waits_for_it(load: Load) -> None:
    """Without limits: whenever a run waits longer than a claim gathers, all slots of its queue are in use."""
    outcome = simulate(load, [{"default": 2, "llm": 2}])
    for at_s, start_s, work in zip(load.at_s, outcome.starts_s, load.work, strict=True):
        queue = load.works[work].queue
        for when_s in (at_s + 0.011, (at_s + start_s) / 2, start_s - 0.011):
            if at_s + 0.011 <= when_s <= start_s - 0.011:
                busy = [
                    other_s
                    for other_s, service_s, other in zip(
                        outcome.starts_s, load.service_s, load.work, strict=True
                    )
                    if load.works[other].queue == queue
                    and other_s <= when_s <= other_s + service_s + 0.011
                ]
                assert len(busy) >= 2


def test_a_head_for_which_a_room_is_kept_goes_when_its_rate_lets_it() -> None:
    """It stands under the room that is kept for it, and no work ends any more that could wake it."""
    one, two, three = (
        Work(org_id=1, queue=queue, capability=capability, keys=("provider:y",))
        for queue, capability in (("llm", "b@1"), ("default", "a@1"), ("llm", "a@1"))
    )
    load = _load([(0.0, 0.0, work) for work in (one, two, one, three, three)])
    outcome = simulate(
        load,
        [{"default": 2, "llm": 1}, {"default": 1, "llm": 1}],
        rules=Rules.of([_rule("provider:y", 1, "rate"), _rule("provider:*", 1)]),
    )
    assert sorted(round(start_s) for start_s in outcome.starts_s) == [0, 0, 10, 20, 30]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from([0.5, 3.0]),
            st.integers(1, 4),
            st.sampled_from([20, 50, 90]),
            st.integers(0, 200),
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 2),
)
def test_what_was_used_and_what_is_reserved_never_passes_what_there_was(
    runs: list[tuple[int, float, int, int, int]], workers: int
) -> None:
    """As a run begins, what ended runs used, live ones have reserved and it needs itself had been earned by then."""
    load = Load()
    for at_s, service_s, org_id, need, used in sorted(runs):
        keys = ("provider:x", f"tokens:{need}")
        load.works.append(Work(org_id=org_id, queue=QUEUE, capability="a@1", keys=keys))
        told = (Used(("provider:x",), used),)
        load.add(float(at_s), service_s, len(load), told)
    rule = Rule(owner=0, key="provider:x", kind="tokens", maximum=10, period_s=1.0, burst=100)
    outcome = simulate(load, [{QUEUE: 2}] * workers, rules=Rules.of([rule]))
    ordered = sorted(runs)
    assert not any(math.isnan(start_s) for start_s in outcome.starts_s)
    for start_s in outcome.starts_s:
        charged = sum(
            used if other_s + service_s <= start_s else need
            for other_s, (_, service_s, _, need, used) in zip(
                outcome.starts_s, ordered, strict=True
            )
            if other_s <= start_s
        )
        assert charged <= 100 + 10 * start_s + 0.01


def test_a_closed_limit_lets_nothing_go_and_the_rest_goes_on() -> None:
    open_, closed = (
        Work(org_id=1, queue=QUEUE, capability="a@1"),
        Work(org_id=2, queue=QUEUE, capability="a@1", keys=("model:m",)),
    )
    load = _load([(0.1 * nth, 1.0, [open_, closed][nth % 2]) for nth in range(20)])
    outcome = simulate(load, [{QUEUE: 2}], rules=Rules.of([_rule("model:m", 0)]))
    found = {one.org_id: one.waits for one in figures(load, outcome, [{QUEUE: 2}]).orgs}
    assert (found[1].never, found[2].never, found[2].runs) == (0, 10, 10)


def test_a_run_that_needs_many_keys_is_not_starved() -> None:
    """Both keys are kept busy by others alone; room is kept for the one that needs both."""
    x, y = (
        Work(org_id=nth, queue=QUEUE, capability="a@1", keys=(f"provider:{name}",))
        for nth, name in ((1, "x"), (2, "y"))
    )
    both = Work(org_id=3, queue=QUEUE, capability="a@1", keys=("provider:x", "provider:y"))
    runs = [(0.0, 1.3, x) for _ in range(60)] + [(0.0, 2.0, y) for _ in range(60)]
    load = _load([*runs, (1.0, 1.0, both)])
    outcome = simulate(load, [{QUEUE: 8}], rules=Rules.of([_rule("provider:*", 1)]))
    (start_s,) = [
        start_s
        for start_s, work in zip(outcome.starts_s, load.work, strict=True)
        if load.works[work] == both
    ]
    assert start_s <= 1.0 + 5.0 + 2 * 2.0 + 0.1


def test_shares_are_in_proportion_to_weights_while_all_have_backlog() -> None:
    weights = {1: 1.0, 2: 2.0, 3: 4.0}
    load = _load(
        [
            (
                0.01 * nth,
                [0.2, 1.0, 0.5][org % 3],
                Work(org_id=org, queue=QUEUE, capability=f"f{org}@1"),
            )
            for nth in range(3000)
            for org in weights
        ]
    )
    outcome = simulate(load, [{QUEUE: 8}], weights=weights)
    found = figures(load, outcome, [{QUEUE: 8}], weights=weights)
    for one in found.orgs:
        assert one.share == pytest.approx(weights[one.org_id] / 7, abs=0.02)
    assert found.slots_share[QUEUE] > 0.99


def _had_s(load: Load, outcome: Outcome, org_id: int, until_s: float) -> float:
    """Return the worker-seconds that an org had until a time."""
    return sum(
        max(0.0, min(start_s + service_s, until_s) - start_s)
        for start_s, service_s, work in zip(
            outcome.starts_s, load.service_s, load.work, strict=True
        )
        if load.works[work].org_id == org_id
    )


@pytest.mark.parametrize("workers", [[4], [2, 2]], ids=["one worker", "two workers"])
def test_an_org_with_long_runs_gets_no_more_time_than_one_with_short_runs(
    workers: list[int],
) -> None:
    """Of one flow, so that what is expected of a run is the same for both; at any time within the bound."""
    long_s, short_s, slots = 0.5, 0.05, sum(workers)
    longs, shorts = (Work(org_id=org_id, queue=QUEUE, capability="a@1") for org_id in (1, 2))
    load = _load([(0.0, long_s, longs)] * 100 + [(0.0, short_s, shorts)] * 1000)
    outcome = simulate(load, [{QUEUE: one} for one in workers])
    bound_s = (slots + 1) * (long_s + short_s) + slots * EVERY_S
    for tenth in range(1, 230):
        gap_s = _had_s(load, outcome, 1, tenth / 10) - _had_s(load, outcome, 2, tenth / 10)
        assert abs(gap_s) <= bound_s
    # By count of runs alone the long ones would have ten times as much.
    assert _had_s(load, outcome, 1, 22.0) == pytest.approx(
        _had_s(load, outcome, 2, 22.0), abs=bound_s
    )


def test_what_is_under_way_is_charged_before_it_ends() -> None:
    """An org that has three slots of four for half a minute does not get the fourth as well."""
    longs, shorts = (Work(org_id=org_id, queue=QUEUE, capability="a@1") for org_id in (1, 2))
    load = _load([(0.0, 30.0, longs)] * 3 + [(1.0, 30.0, longs)] * 9 + [(0.0, 0.1, shorts)] * 400)
    outcome = simulate(load, [{QUEUE: 4}])
    began = sorted(
        start_s
        for start_s, work in zip(outcome.starts_s, load.work, strict=True)
        if load.works[work] == shorts and start_s < 30.0
    )
    assert max(later - sooner for sooner, later in pairwise(began)) < 0.2
    assert began[-1] > 29.0


def test_an_org_that_was_idle_gets_no_credit_for_that_time() -> None:
    one, late = (Work(org_id=org_id, queue=QUEUE, capability="a@1") for org_id in (1, 2))
    load = _load([(0.0, 0.2, one)] * 2000 + [(50.0, 0.2, late)] * 1000)
    outcome = simulate(load, [{QUEUE: 4}])
    bound_s = 5 * (0.2 + 0.2) + 4 * EVERY_S
    for until_s in (51.0, 55.0, 70.0):
        had_s = _had_s(load, outcome, 1, until_s) - _had_s(load, outcome, 1, 50.0)
        assert abs(had_s - _had_s(load, outcome, 2, until_s)) <= bound_s
    assert _had_s(load, outcome, 2, 51.0) > 0


def test_nobody_starts_behind_time_that_was_charged_and_not_used() -> None:
    """By what the flow took before an org is charged minutes, and given them back; then another comes."""
    slow, quick, late = (Work(org_id=org_id, queue=QUEUE, capability="a@1") for org_id in (1, 2, 3))
    load = _load([(0.0, 30.0, slow)] + [(40.0, 0.01, quick)] * 2000 + [(40.4, 0.01, late)] * 2000)
    outcome = simulate(load, [{QUEUE: 2}])
    before_s = _had_s(load, outcome, 2, 40.4)
    for until_s in (42.0, 44.0, 48.0):
        had_s = _had_s(load, outcome, 2, until_s) - before_s
        assert abs(had_s - _had_s(load, outcome, 3, until_s)) <= 2.0


def test_spreading_over_flows_and_keys_gains_nothing() -> None:
    plain = Work(org_id=1, queue=QUEUE, capability="a@1")
    spread = [
        Work(
            org_id=2,
            queue=QUEUE,
            capability=f"f{nth % 20}@1",
            keys=(f"ticket:{nth}",),
            priority=nth % 3,
        )
        for nth in range(200)
    ]
    load = _load([(0.0, 0.2, work) for work in spread * 5] + [(0.0, 0.2, plain)] * 1000)
    outcome = simulate(load, [{QUEUE: 4}])
    bound_s = 5 * (0.2 + 0.2) + 4 * EVERY_S
    for until_s in (5.0, 20.0, 80.0):
        gap_s = _had_s(load, outcome, 1, until_s) - _had_s(load, outcome, 2, until_s)
        assert abs(gap_s) <= bound_s


def test_noisy_orgs_do_not_degrade_quiet_ones_and_one_line_for_all_would() -> None:
    """The bounds on fairness are such that first come, first served misses every one of them."""
    load, workers, weights = load_of(NOISY), workers_of(NOISY), weights_of(NOISY)

    def judged(given: Load) -> tuple[float, float, float]:
        outcome = simulate(given, workers, weights=weights)
        found = figures(load, outcome, workers, weights=weights)
        quiet = [one for one in found.orgs if one.org_id > NOISY.noisy]
        asked_s: defaultdict[int, float] = defaultdict(float)
        for service_s, work in zip(load.service_s, load.work, strict=True):
            asked_s[load.works[work].org_id] += service_s
        had = sum(one.worker_s for one in quiet) / sum(asked_s[one.org_id] for one in quiet)
        return found.jain, had, max(one.waits.p95_s for one in quiet)

    fair_jain, fair_had, fair_wait_s = judged(load)
    assert fair_jain > 0.98
    assert fair_had > 0.95
    line_jain, line_had, line_wait_s = judged(in_one_line(load))
    assert line_jain < 0.95
    assert line_had < 0.8
    assert fair_wait_s < line_wait_s / 5


def test_limits_on_keys_are_full_and_never_passed_in_a_big_scene() -> None:
    scene = replace(NOISY, keys=True, slots=40, runs=4000)
    load, workers = load_of(scene), workers_of(scene)
    found = figures(load, simulate(load, workers, rules=rules_of(scene)), workers)
    assert len(found.rooms) == 20
    assert {room.most_in_use for room in found.rooms} == {2}
    assert max(room.full_share for room in found.rooms) > 0.9
    assert found.waits.never == 0


@given(st.dictionaries(st.integers(1, 9), st.floats(0.1, 100), min_size=1), st.floats(0.1, 300))
def test_max_min_gives_all_away_and_nobody_more_than_asked(
    asked: dict[int, float], capacity: float
) -> None:
    weights = {one: 1.0 + one % 3 for one in asked}
    fair = max_min(asked, capacity, weights)
    assert sum(fair.values()) == pytest.approx(min(capacity, sum(asked.values())))
    level = max(fair[one] / weights[one] for one in asked)
    for one in asked:
        assert fair[one] <= asked[one] + 1e-9
        assert fair[one] == pytest.approx(asked[one]) or fair[one] / weights[one] == pytest.approx(
            level
        )


def test_jains_index_and_waits_of_nothing_and_of_one() -> None:
    assert jain([1.0, 1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([]) == 1.0
    assert waits(array("d"), 2).runs == 2
    assert waits(array("d", [3.0]), 0).p99_s == 3.0
    assert Counter(figures(Load(), Outcome(starts_s=array("d")), [{QUEUE: 1}]).slots_share) == {
        QUEUE: 0.0
    }


HELPS = {"default": ["llm"]}
spills = st.sampled_from(
    [
        Spill(helps=HELPS),
        Spill(helps={"default": ["llm"], "llm": ["default"]}, keep={"default": 1}),
        Spill(helps={"llm": ["default"]}, reserve={"llm": 1}),
        Spill(reserve={"default": 1, "llm": 1}),
    ]
)


@settings(max_examples=200, deadline=None)
@given(loads, limits, st.lists(st.integers(2, 4), min_size=1, max_size=2), spills)
def test_what_spills_is_served_to_its_end_in_the_slots_that_there_are(
    load: Load, rules: list[Rule], slots: list[int], spill: Spill
) -> None:
    workers = [{"default": one, "llm": one} for one in slots]
    outcome = simulate(load, workers, rules=Rules.of(rules), spills=[spill] * len(workers))
    assert not any(math.isnan(start_s) for start_s in outcome.starts_s)
    assert _most_at_once(load, outcome, dict.fromkeys(load.works, True)) <= 2 * sum(slots)
    for queue in {"default", "llm"}.difference(*spill.helps.values()):
        of = {one: one.queue == queue for one in load.works}
        assert _most_at_once(load, outcome, of) <= sum(slots)


def test_a_surge_has_the_idle_slots_of_a_queue_that_helps_and_own_work_the_next_free_one() -> None:
    load = Load(
        works=[
            Work(org_id=1, queue="llm", capability="a@1"),
            Work(org_id=2, queue="default", capability="a@1"),
        ]
    )
    for _ in range(16):
        load.add(0.0, 10.0, 0)
    load.add(1.0, 10.0, 1)
    slots = [{"default": 6, "llm": 2}]
    alone, helped = simulate(load, slots), simulate(load, slots, spills=[Spill(helps=HELPS)])
    kept = simulate(load, slots, spills=[Spill(helps=HELPS, keep={"default": 1})])
    assert alone.until_s == pytest.approx(80, abs=0.5)
    assert helped.until_s == pytest.approx(30, abs=0.5)
    assert [out.starts_s[16] for out in (alone, helped, kept)] == pytest.approx(
        [1.0, 10.0, 1.0], abs=0.1
    )


def test_each_worker_helps_and_keeps_as_it_says_itself() -> None:
    """One of two workers lends its idle slots; what the other has idle stays so."""
    surge = Work(org_id=1, queue="llm", capability="a@1")
    load = _load([(0.0, 10.0, surge)] * 12)
    slots = [{"default": 4, "llm": 1}, {"default": 4, "llm": 1}]
    one = simulate(load, slots, spills=[Spill(helps=HELPS), Spill()])
    both = simulate(
        load, slots, spills=[Spill(helps=HELPS), Spill(helps=HELPS, keep={"default": 2})]
    )
    assert one.until_s == pytest.approx(20, abs=0.5)
    assert sum(start_s < 1 for start_s in one.starts_s) == 6
    assert sum(start_s < 1 for start_s in both.starts_s) == 8


def test_an_org_alone_leaves_reserved_slots_to_one_that_comes() -> None:
    load = Load(
        works=[
            Work(org_id=1, queue="default", capability="a@1"),
            Work(org_id=2, queue="default", capability="a@1"),
        ]
    )
    for _ in range(20):
        load.add(0.0, 10.0, 0)
    load.add(1.0, 10.0, 1)
    slots = [{"default": 5}]
    first = simulate(load, slots)
    later = simulate(load, slots, spills=[Spill(reserve={"default": 1})])
    assert [out.starts_s[20] for out in (first, later)] == pytest.approx([10.0, 1.0], abs=0.1)
    # While the other's run is in one slot, the last free one is kept for a third.
    assert later.until_s == pytest.approx(51, abs=0.5)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_orgs_of_several_queues_share_a_key_by_worker_time(order: tuple[int, ...]) -> None:
    """Whichever queue comes first: one org with long runs, one with short ones, one with both and in both queues."""
    size, until_s = 4, 60.0
    rules = Rules.of([Rule(owner=0, key="provider:x", kind="concurrency", maximum=size)])
    of = {1: [("llm", 1.0)], 2: [("sql", 0.1)], 3: [("llm", 0.5), ("sql", 0.2)]}
    load = Load()
    for org in order:
        for queue, service_s in of[org]:
            load.works.append(Work(org_id=org, queue=queue, capability="f@1", keys=("provider:x",)))
            for _ in range(round(size * until_s / service_s)):
                load.add(0.0, service_s, len(load.works) - 1)
    slots = {load.works[0].queue: 8, "llm": 8, "sql": 8}
    starts_s = simulate(load, [slots], rules=rules).starts_s
    had_s = dict.fromkeys(of, 0.0)
    for start_s, service_s, work in zip(starts_s, load.service_s, load.work, strict=True):
        org = load.works[work].org_id
        had_s[org] += max(0.0, min(until_s, start_s + service_s) - start_s)
    longest = {org: max(service_s for _, service_s in works) for org, works in of.items()}
    assert sum(had_s.values()) > 0.95 * size * until_s, "places stay empty"
    for one in of:
        for other in of:
            bound = (size + 1) * (longest[one] + longest[other]) + EVERY_S * size
            assert abs(had_s[one] - had_s[other]) <= bound
