"""Properties of the pure gathering: nothing lost, nothing twice, and polling late changes no outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from millpond.engine.gathering import MAX_HELD_BYTES, Fire, Group, Held, Rule, lapse, take

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def event(number: int, size_bytes: int = 100) -> Held:
    return Held(document=number, size_bytes=size_bytes)


@dataclass
class Story:
    """What a group did over time: each fire with when it was decided."""

    rule: Rule
    group: Group | None = None
    fires: list[tuple[float, Fire]] = field(default_factory=list)
    dropped: int = 0

    def arrive(self, number: int, when: float, size_bytes: int = 100) -> None:
        decision = take(self.rule, self.group, event(number, size_bytes), at(when))
        self._follow(decision.group, decision.fires, when)

    def poll(self, when: float) -> None:
        if self.group is not None:
            decision = lapse(self.group, at(when))
            if decision.group is None:
                self.dropped += self.group.dropped
            self._follow(decision.group, decision.fires, when)

    def _follow(self, group: Group | None, fires: tuple[Fire, ...], when: float) -> None:
        self.group = group
        self.fires += [(when, fire) for fire in fires]

    @property
    def fired(self) -> list[list[int]]:
        return [[one.document for one in fire] for _, fire in self.fires]

    @property
    def held(self) -> int:
        return len(self.group.events) if self.group else 0

    @property
    def all_dropped(self) -> int:
        return self.dropped + (self.group.dropped if self.group else 0)


# Quarters of a second, so that events and due times fall together often.
gaps = st.lists(st.integers(0, 40).map(lambda n: n / 4), min_size=1, max_size=30)
throttles = st.builds(Rule, mode=st.just("throttle"), period_s=st.sampled_from([1.0, 3.0, 7.5]))
endless = st.builds(Rule, mode=st.just("debounce"), period_s=st.sampled_from([1.0, 3.0]))
bounded = st.builds(
    Rule,
    mode=st.just("debounce"),
    period_s=st.sampled_from([1.0, 3.0]),
    max_wait_s=st.sampled_from([4.0, 9.0]),
)
batches = st.builds(
    Rule,
    mode=st.just("batch"),
    max_count=st.integers(1, 5),
    max_wait_s=st.sampled_from([1.0, 6.0]),
)
rules = st.one_of(st.just(Rule(mode="each")), throttles, endless, bounded, batches)


def times(of: list[float]) -> list[float]:
    found, now = [], 0.0
    for gap in of:
        now += gap
        found.append(now)
    return found


def told(rule: Rule, arrivals: list[float], polls: list[float]) -> Story:
    """Play arrivals and polls in order of time; at the same time polls come first."""
    story = Story(rule)
    steps = [(when, 0, -1) for when in polls] + [(when, 1, n) for n, when in enumerate(arrivals)]
    for when, kind, number in sorted(steps):
        if kind:
            story.arrive(number, when)
        else:
            story.poll(when)
    return story


@given(rule=rules, gaps=gaps, polls=st.lists(st.integers(0, 1200).map(lambda n: n / 4)))
def test_every_event_is_fired_once_or_dropped_or_held(rule, gaps, polls):
    story = told(rule, times(gaps), polls)
    fired = [number for fire in story.fired for number in fire]
    assert fired == sorted(set(fired))
    assert len(fired) + story.all_dropped + story.held == len(gaps)


@given(rule=rules, gaps=gaps, polls=st.lists(st.integers(0, 1200).map(lambda n: n / 4)))
def test_polling_rarely_or_often_gives_the_same_runs(rule, gaps, polls):
    arrivals = times(gaps)
    end = arrivals[-1] + 1000
    assert told(rule, arrivals, [*polls, end]).fired == told(rule, arrivals, [end]).fired


@given(rule=rules, gaps=gaps)
def test_nothing_is_held_past_its_time(rule, gaps):
    arrivals = times(gaps)
    story = told(rule, arrivals, [n / 4 for n in range(int(arrivals[-1] * 4) + 100)])
    for when, fire in story.fires:
        first, last = arrivals[fire[0].document], arrivals[fire[-1].document]
        match rule.mode:
            case "each" | "throttle":
                assert when == last
            case "debounce":
                assert when <= last + rule.period_s
            case "batch":
                assert when <= first + rule.max_wait_s
    assert story.held == 0


@given(rule=throttles, gaps=gaps)
def test_throttled_runs_of_a_group_are_a_period_apart(rule, gaps):
    story = told(rule, times(gaps), [])
    starts = [when for when, _ in story.fires]
    assert all(b - a >= rule.period_s for a, b in pairwise(starts))
    assert starts[0] == times(gaps)[0]


@given(rule=endless, gaps=gaps)
def test_a_debounced_run_gets_the_last_event_of_its_burst(rule, gaps):
    arrivals = times(gaps)
    last_of_bursts = [
        n
        for n, when in enumerate(arrivals)
        if n + 1 == len(arrivals) or arrivals[n + 1] - when >= rule.period_s
    ]
    story = told(rule, arrivals, [arrivals[-1] + 1000])
    assert story.fired == [[n] for n in last_of_bursts]


@given(rule=bounded, gaps=gaps)
def test_a_debounced_burst_without_end_still_runs(rule, gaps):
    arrivals = times(gaps)
    story = told(rule, arrivals, [n / 4 for n in range(int(arrivals[-1] * 4) + 100)])
    done = 0
    for when, fire in story.fires:
        # The first event that this run stands for has waited no longer than it may.
        assert when - arrivals[done] <= rule.max_wait_s
        done = fire[0].document + 1


@given(sizes=st.lists(st.integers(1, MAX_HELD_BYTES), min_size=1, max_size=20))
def test_a_batch_never_outgrows_the_input_of_a_run(sizes):
    story = Story(Rule(mode="batch", max_count=1000, max_wait_s=60.0))
    for number, size in enumerate(sizes):
        story.arrive(number, 0.0, size)
    story.poll(60.0)
    assert all(sum(one.size_bytes for one in fire) <= MAX_HELD_BYTES for _, fire in story.fires)
    assert [n for fire in story.fired for n in fire] == list(range(len(sizes)))


def test_a_batch_is_full_at_its_count():
    story = Story(Rule(mode="batch", max_count=3, max_wait_s=60.0))
    for number in range(7):
        story.arrive(number, 0.0)
    assert (story.fired, story.held) == ([[0, 1, 2], [3, 4, 5]], 1)
