"""Brakes on any sequence of throttles, failures, successes and times: what they let go, and how it wears off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millpond.engine.brakes import (
    MOST_OPEN_S,
    MOST_S,
    RECOVERY_PER_S,
    SMALLEST,
    Brake,
    BrakeState,
    reached,
    throttled,
    tripped,
)
from millpond.engine.rules import RoomId, Rule, Rules, slowed

KEY = "provider:p"
ROOM = RoomId("brake", 0, 0, KEY)
_US = 1_000_000
START_US = 1_700_000_000 * _US
WISHES = st.one_of(st.none(), st.floats(0, 1e9))
STEPS = st.tuples(
    st.integers(0, 400 * _US),
    st.sampled_from(["429", "trip", "answer"]),
    WISHES,
    st.integers(0, 99),
)


def after(
    brake: Brake | None, now_us: int, what: str, wish_s: float | None, in_use: int
) -> Brake | None:
    if what == "429":
        return throttled(brake, owner=0, key=KEY, now_us=now_us, wish_s=wish_s, in_use=in_use)
    if what == "trip":
        return tripped(brake, owner=0, key=KEY, now_us=now_us, in_use=in_use)
    return None if brake is None else reached(brake, now_us)


@given(st.lists(STEPS, max_size=30))
def test_ends_only_move_on_and_nothing_goes_before_them(
    steps: list[tuple[int, str, float | None, int]],
) -> None:
    brake: Brake | None = None
    now_us = START_US
    for passed_us, what, wish_s, in_use in steps:
        now_us += passed_us
        before, brake = brake, after(brake, now_us, what, wish_s, in_use)
        if brake is None:
            continue
        assert brake.until_us >= (0 if before is None else before.until_us)
        assert SMALLEST <= brake.factor <= 1
        assert brake.until_us <= now_us + (max(MOST_S, MOST_OPEN_S) + 1) * _US
        assert brake.over_us >= brake.until_us
        if now_us < brake.until_us:
            assert brake.ceiling_at(brake.until_us - 1) == 0
        assert brake.ceiling_at(brake.until_us) >= 1, "a brake never stops a key for ever"
        if what == "429":
            wait_us = 0 if wish_s is None else int(min(wish_s, MOST_S) * _US)
            assert brake.until_us >= now_us + wait_us, "a wish is obeyed to its end"


@given(st.lists(STEPS, min_size=1, max_size=30), st.integers(0, 10**9), st.integers(0, 10**9))
def test_what_is_allowed_grows_with_time_alone(
    steps: list[tuple[int, str, float | None, int]], early_us: int, late_us: int
) -> None:
    brake: Brake | None = None
    now_us = START_US
    for passed_us, what, wish_s, in_use in steps:
        now_us += passed_us
        brake = after(brake, now_us, what, wish_s, in_use)
    if brake is None:
        return
    first, second = sorted((now_us + early_us, now_us + late_us))
    assert brake.factor_at(first) <= brake.factor_at(second)
    assert brake.ceiling_at(first) <= brake.ceiling_at(second)
    if brake.opened_us is None:
        assert brake.factor_at(brake.over_us) == 1.0
        assert brake.state_at(brake.over_us) is BrakeState.OVER
        assert brake.over_us - brake.until_us <= (1 / RECOVERY_PER_S + 1) * _US
    else:
        if second < brake.over_us:
            assert brake.ceiling_at(second) <= 1, "one probe at a time"
        assert brake.state_at(brake.over_us) is BrakeState.OVER, "it ends where nobody probes it"


@given(st.integers(1, 60), st.floats(0, 600), st.integers(0, 50))
def test_many_answers_of_one_moment_lower_it_once(answers: int, wish_s: float, in_use: int) -> None:
    first = throttled(None, owner=0, key=KEY, now_us=START_US, wish_s=wish_s + 1, in_use=in_use)
    brake = first
    for nth in range(answers):
        brake = throttled(
            brake, owner=0, key=KEY, now_us=START_US + nth, wish_s=wish_s, in_use=in_use
        )
    assert brake == first
    again = throttled(brake, owner=0, key=KEY, now_us=brake.until_us, wish_s=1.0, in_use=in_use)
    assert again.factor < first.factor
    assert again.hits == first.hits + 1


@given(st.lists(STEPS, max_size=20), st.integers(0, 600 * _US))
def test_only_the_answer_to_a_probe_closes_a_breaker(
    steps: list[tuple[int, str, float | None, int]], passed_us: int
) -> None:
    brake: Brake | None = None
    now_us = START_US
    for step_us, what, wish_s, in_use in steps:
        now_us += step_us
        before, brake = brake, after(brake, now_us, what, wish_s, in_use)
        if before is not None and before.opened_us and brake is not None and not brake.opened_us:
            assert what == "answer"
            assert before.state_at(now_us) is BrakeState.HALF_OPEN
            assert brake.state_at(now_us) is BrakeState.RECOVERING
    opened = tripped(brake, owner=0, key=KEY, now_us=now_us + passed_us, in_use=1)
    assert opened.opened_us
    assert opened.state_at(now_us + passed_us) is BrakeState.OPEN


RULES = st.one_of(
    st.builds(
        Rule,
        owner=st.just(0),
        key=st.just(KEY),
        kind=st.just("concurrency"),
        maximum=st.integers(0, 10**6),
    ),
    st.builds(
        Rule,
        owner=st.just(0),
        key=st.just(KEY),
        kind=st.just("rate"),
        maximum=st.integers(1, 1000),
        period_s=st.floats(0.1, 86_400),
        burst=st.integers(1, 50),
    ),
)


@given(RULES, st.floats(SMALLEST, 1.0))
def test_a_lowered_limit_allows_less_and_never_nothing(rule: Rule, factor: float) -> None:
    lowered = slowed(rule, factor)
    assert lowered.maximum <= rule.maximum
    assert (lowered.maximum > 0) == (rule.maximum > 0)
    if rule.kind == "rate":
        assert lowered.interval_us >= rule.interval_us
        assert lowered.span_us >= rule.span_us, "its meter is never cut below what the whole says"
    else:
        assert lowered.maximum <= max(1, rule.maximum * factor)


def test_a_brake_is_a_room_of_whoever_has_its_key_and_lowers_their_limits() -> None:
    now_us = START_US
    rules = Rules.of(
        [
            Rule(owner=0, key="provider:*", kind="concurrency", maximum=10),
            Rule(owner=0, key="org:*×provider:p", kind="concurrency", maximum=4),
        ]
    )
    assert [place.rule.maximum for place in rules.places(1, "default", "f@1", [KEY])] == [10, 4]
    cooling = throttled(None, owner=0, key=KEY, now_us=now_us, wish_s=10.0, in_use=8)
    rules.brake(0, KEY, cooling)
    rules.brake(2, KEY, tripped(None, owner=2, key=KEY, now_us=now_us, in_use=8))

    def allowed(org_id: int, key: str, at_us: int) -> list[int]:
        places = rules.places(org_id, "default", "f@1", [key])
        return [rules.rule_at(*place, at_us).maximum for place in places]

    assert allowed(1, KEY, now_us) == [0, 5, 2]
    assert allowed(1, "provider:other", now_us) == [10]
    assert allowed(2, KEY, now_us)[:2] == [0, 0], "its own and everybody's"
    assert allowed(1, KEY, cooling.until_us) == [4, 5, 2]
    assert allowed(1, KEY, cooling.until_us + 10 * _US) == [14, 6, 2]
    assert allowed(1, KEY, cooling.over_us)[1:] == [10, 4]
    assert rules.rule_of(ROOM) is not None
    rules.brake(0, KEY, None)
    assert rules.rule_of(ROOM) is None
    assert allowed(1, KEY, now_us) == [10, 4]
