"""The exact checks over all windows are themselves held against counting each window by hand."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.soak.ledger import (
    LATE_S,
    Allowance,
    Edit,
    most_in_flight_over,
    most_over,
    times_full,
    used,
)

gaps = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 2.0]), min_size=1, max_size=60)


def one(value: float) -> list[Edit]:
    return [Edit(sent_s=0.0, done_s=0.0, value=value)]


@given(gaps, st.floats(0.5, 200), st.integers(1, 20))
def test_the_worst_window_is_the_one_that_counting_each_of_them_finds(
    gaps_s: list[float], rate: float, burst: int
) -> None:
    at_s = list(accumulate(gaps_s, initial=1000.0))
    by_hand = max(
        count - rate * (end_s - start_s + LATE_S) - burst
        for nth, start_s in enumerate(at_s)
        for count, end_s in enumerate(at_s[nth:], 1)
    )
    assert most_over(at_s, Allowance(one(rate), burst)) == pytest.approx(by_hand, abs=1e-6)


def test_a_window_across_an_edit_may_have_what_both_rates_allow_in_their_time() -> None:
    edits = [*one(10.0), Edit(sent_s=20.0, done_s=20.5, value=40.0)]
    raised = Allowance(edits, burst=1)
    assert raised.until(21.0) - raised.until(19.0) == pytest.approx(10 + 40)
    lowered = Allowance([*edits, Edit(sent_s=30.0, done_s=30.5, value=20.0)], burst=4)
    # The higher one counts until the edit was answered, and half of the burst is let go once.
    assert lowered.until(31.0) - lowered.until(29.9) == pytest.approx(0.6 * 40 + 10 + 2)
    assert lowered.between(30.0, 31.0) == pytest.approx(20 + 10)
    assert lowered.between(19.0, 31.0) == pytest.approx(10 + 10.5 * 40 + 10)


def test_a_burst_after_the_burst_is_told_of() -> None:
    allowance = Allowance(one(10.0), burst=5)
    spaced = [nth / 10 for nth in range(100)]
    assert most_over([*spaced, *[10.0] * 4], allowance) < 0
    assert most_over([*spaced, *[10.0] * 9], allowance) > 0
    assert used(spaced, allowance, 2.0, 8.0) == pytest.approx(1.0)
    assert used(spaced[:50], allowance, 0.0, 10.0) == pytest.approx(0.5)


def test_more_in_flight_than_the_limit_is_told_of_and_what_went_before_an_edit_has_its_time() -> (
    None
):
    edits = [
        *one(4),
        Edit(sent_s=10.0, done_s=10.2, value=2),
        Edit(sent_s=20.0, done_s=20.2, value=6),
    ]
    at_s, in_flight = [5.0, 10.9, 15.0, 20.1], [4, 4, 2, 6]
    assert most_in_flight_over(at_s, in_flight, edits, grace_s=1.0) == 0
    assert most_in_flight_over([*at_s, 21.0], [*in_flight, 7], edits, grace_s=1.0) == 1
    assert most_in_flight_over([11.3], [3], edits, grace_s=1.0) == 1
    assert times_full(at_s, in_flight, edits, begin_s=0.0) == 1.0
    assert times_full(at_s, [4, 1, 2, 2], edits, begin_s=0.0) == pytest.approx(0.75)
