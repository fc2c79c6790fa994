"""Properties of the place in the fair order, and of estimates of the start: they tell what the admission does."""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Sequence
from copy import deepcopy
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.engine.admission import Lane, Share, admit
from millpond.engine.ordering import (
    LEAST_SEEN_S,
    Estimate,
    Line,
    Pace,
    Position,
    Slots,
    all_of,
    any_of,
    next_room_s,
    position,
    shown,
    start_in_line,
)

COSTS = st.sampled_from([0.25, 0.5, 1.0, 3.0])
lanes = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(-20, 20), COSTS),
    min_size=1,
    max_size=3,
)


def _share(
    org_id: int, weight: float, virtual_s: float, found: Sequence[tuple[list[int], int, float]]
) -> Share:
    return Share(
        queue="default",
        org_id=org_id,
        weight=weight,
        virtual_s=virtual_s,
        lanes=[
            Lane(
                lane_id=nth,
                offset_us=offset_us,
                ranks=sorted(ranks),
                items=[uuid.UUID(int=10_000 * org_id + 100 * nth + k) for k in range(len(ranks))],
                is_whole=True,
                estimate_s=cost,
            )
            for nth, (ranks, offset_us, cost) in enumerate(found)
        ],
    )


shares = st.lists(
    st.builds(
        _share,
        org_id=st.integers(1, 6),
        weight=st.sampled_from([0.5, 1.0, 2.0]),
        virtual_s=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
        found=lanes,
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda share: share.org_id,
)


def _in_order(share: Share) -> list[tuple[uuid.UUID, float]]:
    """Return an org's items with what they cost, in the order in which its lanes' heads go."""
    found = [
        (rank + lane.offset_us, lane.lane_id, item, lane.estimate_s)
        for lane in share.lanes
        for rank, item in zip(lane.ranks, lane.items, strict=True)
    ]
    return [(item, cost_s) for _, _, item, cost_s in sorted(found)]


def _line(share: Share, ahead: Sequence[float], own: Share) -> Line:
    return Line(
        weight=share.weight,
        virtual_s=share.virtual_s,
        ahead=ahead,
        goes_first=share.org_id < own.org_id,
    )


@given(shares)
def test_as_many_go_before_an_item_as_its_position_tells_one_slot_at_a_time(
    members: list[Share],
) -> None:
    left = deepcopy(members)
    went: list[uuid.UUID] = []
    while picks := admit(left, {"default": 1}).picks:
        went += [pick.item_id for pick in picks]
    assert len(went) == sum(len(lane.items) for share in members for lane in share.lanes)
    for own in members:
        others = [
            _line(share, [cost_s for _, cost_s in _in_order(share)], own)
            for share in members
            if share is not own
        ]
        ahead: list[float] = []
        for nth, (item, cost_s) in enumerate(_in_order(own)):
            told = position(_line(own, ahead, own), others, 1000)
            assert (told.of_org, told.of_all, told.is_exact) == (nth, went.index(item), True)
            ahead.append(cost_s)


SMALL = st.sampled_from([0.0002, 0.0005, 0.0015, 0.002, 0.02])
small_shares = st.lists(
    st.builds(
        _share,
        org_id=st.integers(1, 6),
        weight=st.sampled_from([0.5, 1.0, 2.0]),
        virtual_s=st.sampled_from([0.0, 0.001, 0.004, 0.03]),
        found=st.lists(
            st.tuples(
                st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True),
                st.just(0),
                SMALL,
            ),
            min_size=1,
            max_size=2,
        ),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda share: share.org_id,
)


@given(small_shares, st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_position_holds_for_claims_of_any_number_of_slots_or_says_that_it_is_the_least(
    members: list[Share], sizes: list[int]
) -> None:
    left = deepcopy(members)
    went: list[uuid.UUID] = []
    nth = 0
    while picks := admit(left, {"default": sizes[nth % len(sizes)]}).picks:
        went += [pick.item_id for pick in picks]
        nth += 1
    for own in members:
        others = [
            _line(share, [cost_s for _, cost_s in _in_order(share)], own)
            for share in members
            if share is not own
        ]
        ahead: list[float] = []
        for item, cost_s in _in_order(own):
            told = position(_line(own, ahead, own), others, 1000)
            before = went.index(item)
            assert told.of_all == before if told.is_exact else told.of_all <= before
            ahead.append(cost_s)


def test_work_that_takes_as_long_as_a_turn_has_an_exact_place() -> None:
    own = Line(weight=1.0, virtual_s=0.5, ahead=[0.02, 0.02])
    others = [Line(weight=1.0, virtual_s=0.5, ahead=[0.02] * 9, goes_first=True)]
    assert position(own, others, 1000) == Position(of_org=2, of_all=5, is_exact=True, work_s=0.1)


def test_a_place_among_small_work_is_told_as_the_least() -> None:
    own = Line(weight=1.0, virtual_s=0.5, ahead=[0.0005])
    others = [Line(weight=1.0, virtual_s=0.5, ahead=[0.0005] * 9, goes_first=True)]
    told = position(own, others, 1000)
    assert (told.of_all, told.is_exact) == (2, False)


@given(shares, st.integers(0, 10))
def test_a_position_stops_at_its_cap_and_says_so(members: list[Share], most: int) -> None:
    own, *others = [
        _line(share, [cost_s for _, cost_s in _in_order(share)], members[0]) for share in members
    ]
    exact, capped = position(own, others, 1000), position(own, others, most)
    assert capped.of_all == min(exact.of_all, most)
    assert capped.is_exact == (exact.of_all <= most)


def _served(rests_s: Sequence[float], maximum: int, ahead: int, cost_s: float) -> float:
    """Let work end and go, place by place; returns when the one behind `ahead` others begins."""
    ends = list(rests_s)
    heapq.heapify(ends)
    now_s, begun = 0.0, 0
    while True:
        while len(ends) < maximum:
            if begun == ahead:
                return now_s
            heapq.heappush(ends, now_s + cost_s)
            begun += 1
        now_s = heapq.heappop(ends)


@given(
    st.lists(st.integers(0, 40).map(lambda n: n / 4), max_size=8),
    st.integers(1, 6),
    st.integers(0, 12),
    st.sampled_from([0.25, 2.0]),
)
def test_a_place_comes_free_when_work_that_goes_before_has_gone(
    rests_s: list[float], maximum: int, ahead: int, cost_s: float
) -> None:
    assert next_room_s(rests_s, maximum, ahead, cost_s) == _served(rests_s, maximum, ahead, cost_s)


@given(st.integers(1, 6), st.integers(0, 5))
def test_where_no_end_is_known_nobody_knows_when_a_place_comes_free(
    maximum: int, ahead: int
) -> None:
    assert next_room_s([None] * maximum, maximum, ahead, 1.0) == inf
    assert next_room_s([1.0] * 3, 0, ahead, 1.0) == inf


@given(
    st.integers(0, 900),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 5000),
    st.floats(0, 60, allow_nan=False),
)
def test_an_estimate_is_of_a_free_slot_or_the_pace_or_of_slots_or_none(
    ahead: int, slots: int, in_use: int, went: int, seen_s: float
) -> None:
    place = Position(of_org=0, of_all=ahead, is_exact=True, work_s=ahead * 2.0)
    told = start_in_line(
        place, Slots(total=slots, in_use=in_use, cost_s=2.0), Pace(went=went, seen_s=seen_s)
    )
    if ahead < slots - in_use:
        assert (told.basis, told.in_s) == ("free_slot", 0.0)
    elif seen_s >= LEAST_SEEN_S:
        assert told.basis == "pace"
        if went:
            assert told.in_s == pytest.approx((ahead + 1) * seen_s / went)
        else:
            assert told.in_s is None
    elif slots:
        assert told.basis == "slots"
        assert told.in_s is not None
        # Those before it, and at most one more round of what is being executed.
        assert ahead * 2.0 / slots <= told.in_s <= (ahead + slots) * 2.0 / slots
    else:
        assert (told.basis, told.in_s) == ("unknown", None)


estimates = st.lists(
    st.builds(
        Estimate,
        in_s=st.none() | st.floats(0, 1e6, allow_nan=False),
        basis=st.sampled_from(["pace", "limit", "timer"]),
        text=st.sampled_from(["one", "two"]),
        is_least=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@given(estimates)
def test_all_conditions_take_as_long_as_the_last_and_any_as_long_as_the_first(
    found: list[Estimate],
) -> None:
    known = [one.in_s for one in found if one.in_s is not None]
    together, first = all_of(found), any_of(found)
    assert together.in_s == (max(known) if len(known) == len(found) else None)
    assert first is not None
    assert first.in_s == min(known, default=None)
    assert shown(together).startswith("Expected" if together.in_s is not None else "When is not")
    assert any_of([]) is None
