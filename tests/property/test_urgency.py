"""Properties of interactive work: it goes first, up to a lead; nobody gains by it in the long run, nothing starves."""

from __future__ import annotations

import heapq
import uuid
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.admission import Lane, Share, admit
from millpond.engine.turns import decide
from millpond.engine.urgency import AGING_S, Urgency

NOW_US = 10**12
LONG_AGO = NOW_US - round(2 * AGING_S * 1e6)
URGENT, STANDARD = 1, 0


def _lane(org: int, kind: int, count: int, cost: float, rank: int = NOW_US) -> Lane:
    return Lane(
        lane_id=kind,
        offset_us=-kind,
        ranks=[rank + nth for nth in range(count)],
        items=[uuid.UUID(int=10_000 * org + 1000 * kind + nth) for nth in range(count)],
        is_whole=True,
        estimate_s=cost,
        is_urgent=kind == URGENT,
    )


def _share(org: int, lanes: Sequence[Lane], virtual_s: float = 0.0, weight: float = 1.0) -> Share:
    return Share(queue="default", org_id=org, weight=weight, virtual_s=virtual_s, lanes=list(lanes))


@st.composite
def members(draw: st.DrawFn) -> list[Share]:
    found = []
    for org in range(1, draw(st.integers(1, 6)) + 1):
        cost = draw(st.sampled_from([0.5, 1.0, 3.0]))
        rank = draw(st.sampled_from([LONG_AGO, NOW_US]))
        lanes = [
            _lane(org, kind, draw(st.integers(0, 6)), cost, rank) for kind in (URGENT, STANDARD)
        ]
        found.append(_share(org, lanes, draw(st.sampled_from([0.0, 2.0, 25.0]))))
    return found


def _urgency(lead_s: float = 10.0) -> Urgency:
    return Urgency(lead_s=lead_s, now_us=NOW_US)


@settings(max_examples=200)
@given(members(), st.integers(0, 30))
def test_slots_are_filled_as_far_as_there_is_work_and_lanes_go_in_order(
    shares: list[Share], slots: int
) -> None:
    waiting = sum(len(lane.items) for share in shares for lane in share.lanes)
    picks = decide(shares, {"default": slots}, urgency=_urgency()).picks
    assert len(picks) == len(set(picks)) == min(slots, waiting)
    for share in shares:
        for lane in share.lanes:
            of = [p.rank for p in picks if (p.org_id, p.lane_id) == (share.org_id, lane.lane_id)]
            assert of == list(lane.ranks[: lane.taken])


@given(members(), st.integers(0, 30))
def test_where_nothing_is_interactive_it_is_the_fair_order(shares: list[Share], slots: int) -> None:
    for share in shares:
        share.lanes = [lane for lane in share.lanes if not lane.is_urgent]
    picks = decide(shares, {"default": slots}, urgency=_urgency()).picks
    for share in shares:
        for lane in share.lanes:
            share.virtual_s -= lane.taken * lane.estimate_s
            lane.taken = 0
    assert picks == admit(shares, {"default": slots}).picks


def test_interactive_heads_go_before_others_in_fair_order_among_themselves() -> None:
    shares = [
        _share(1, [_lane(1, STANDARD, 5, 1.0)]),
        _share(2, [_lane(2, URGENT, 3, 1.0)], 6.0),
        _share(3, [_lane(3, URGENT, 3, 1.0), _lane(3, STANDARD, 3, 1.0)], 5.0),
    ]
    picks = decide(shares, {"default": 8}, urgency=_urgency()).picks
    assert [(p.org_id, p.lane_id) for p in picks[:6]] == [
        (3, URGENT),
        (2, URGENT),
        (3, URGENT),
        (2, URGENT),
        (3, URGENT),
        (2, URGENT),
    ]
    assert [p.org_id for p in picks[6:]] == [1, 1]


def test_an_org_that_has_used_up_its_lead_goes_in_its_turn() -> None:
    shares = [
        _share(1, [_lane(1, URGENT, 40, 1.0)]),
        _share(2, [_lane(2, STANDARD, 40, 1.0)]),
    ]
    picks = decide(shares, {"default": 20}, urgency=_urgency(10.0)).picks
    went = Counter(pick.org_id for pick in picks)
    assert [pick.org_id for pick in picks[:10]] == [1] * 10
    assert went == {1: 15, 2: 5}


def test_a_standard_head_that_waited_long_has_every_second_slot() -> None:
    """However many orgs have interactive work that goes by the lead."""
    shares = [_share(org, [_lane(org, URGENT, 5, 0.1)], 1.0) for org in range(2, 40)]
    shares.append(_share(1, [_lane(1, STANDARD, 50, 0.1, LONG_AGO)]))
    picks = decide(shares, {"default": 20}, urgency=_urgency()).picks
    assert [pick.org_id == 1 for pick in picks] == [False, True] * 10


def test_it_has_every_second_slot_also_where_claims_have_one_slot_each() -> None:
    shares = [_share(org, [_lane(org, URGENT, 9, 0.1)], 1.0) for org in range(2, 9)]
    shares.append(_share(1, [_lane(1, STANDARD, 50, 0.1, LONG_AGO)]))
    urgency, went = _urgency(), []
    for _ in range(10):
        went += [pick.org_id for pick in decide(shares, {"default": 1}, urgency=urgency).picks]
    assert [org == 1 for org in went] == [False, True] * 5


def test_standard_work_of_an_org_is_not_starved_by_its_own_interactive_work() -> None:
    """Beside another org that always comes first where the class does not count."""
    shares = [
        _share(1, [_lane(1, URGENT, 60, 1.0), _lane(1, STANDARD, 60, 1.0, LONG_AGO)]),
        _share(2, [_lane(2, STANDARD, 60, 1.0, LONG_AGO)]),
    ]
    picks = decide(shares, {"default": 40}, urgency=_urgency()).picks
    went = Counter((pick.org_id, pick.lane_id) for pick in picks)
    assert went[1, STANDARD] >= 8
    assert went[1, URGENT] >= went[1, STANDARD]


def test_the_class_moves_a_clock_on_no_further_than_work_without_it() -> None:
    """Else whoever comes next would begin behind those who wait."""
    shares = [
        _share(1, [_lane(1, URGENT, 10, 1.0)], 8.0),
        _share(2, [_lane(2, STANDARD, 10, 1.0)], 3.0),
    ]
    decision = decide(shares, {"default": 4}, urgency=_urgency())
    assert {pick.org_id for pick in decision.picks} == {1}
    assert decision.clocks["default"] <= 3.0


Orgs = list[tuple[float, float, bool, bool]]


def _serve(
    orgs: Orgs, *, slots: int, lead_s: float, until_s: float
) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """Serve endless backlog of (cost, weight, has interactive, has standard); returns service and longest pauses."""
    virtual = dict.fromkeys(range(len(orgs)), 0.0)
    service = dict.fromkeys(virtual, 0.0)
    running: list[tuple[float, int, float, int]] = []
    urgency, now, nth = _urgency(lead_s), 0.0, 0
    last: dict[tuple[int, int], float] = {}
    longest: dict[tuple[int, int], float] = {}
    while now < until_s:
        shares = []
        for org, (cost, weight, *kinds) in enumerate(orgs):
            lanes = [
                _lane(org, kind, slots, cost, LONG_AGO)
                for kind, has in zip((URGENT, STANDARD), kinds, strict=True)
                if has
            ]
            shares.append(_share(org, lanes, virtual[org], weight))
        decide(shares, {"default": slots - len(running)}, urgency=urgency)
        for share in shares:
            virtual[share.org_id] = share.virtual_s
            for lane in share.lanes:
                place = (share.org_id, lane.lane_id)
                if lane.taken:
                    pause_s = now - last.get(place, 0.0)
                    longest[place] = max(longest.get(place, 0.0), pause_s)
                    last[place] = now
                for _ in range(lane.taken):
                    nth += 1
                    heapq.heappush(running, (now + lane.estimate_s, nth, now, share.org_id))
        assert len(running) == slots
        now = running[0][0]
        while running and running[0][0] <= now:
            end, _, began, org = heapq.heappop(running)
            service[org] += end - began
    for _, _, began, org in running:
        service[org] += now - began
    for org, (_, _, *kinds) in enumerate(orgs):
        for kind, has in zip((URGENT, STANDARD), kinds, strict=True):
            if has:
                since_s = now - last.get((org, kind), 0.0)
                longest[org, kind] = max(longest.get((org, kind), 0.0), since_s)
    return service, longest


backlogs = st.lists(
    st.tuples(
        st.sampled_from([0.1, 0.5, 2.0]),
        st.sampled_from([1.0, 2.0, 4.0]),
        st.booleans(),
        st.booleans(),
    ).filter(lambda one: one[2] or one[3]),
    min_size=2,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(backlogs, st.integers(1, 6), st.sampled_from([0.0, 3.0, 10.0]))
def test_an_org_gains_the_lead_by_the_class_and_no_more(
    orgs: Orgs, slots: int, lead_s: float
) -> None:
    """|Wf/rf - Wm/rm| <= (S + 1) * (lf/rf + lm/rm) + lead, whatever is called interactive."""
    service, _ = _serve(orgs, slots=slots, lead_s=lead_s, until_s=30.0)
    for one, (cost, weight, *_) in enumerate(orgs):
        for other, (of, to, *_) in enumerate(orgs):
            bound = (slots + 1) * (cost / weight + of / to) + lead_s
            assert abs(service[one] / weight - service[other] / to) <= bound + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    backlogs.map(lambda orgs: [(max(0.5, one[0]), *one[1:]) for one in orgs[:3]]),
    st.integers(1, 4),
)
def test_no_lane_stands_still_for_long(orgs: Orgs, slots: int) -> None:
    """Its org's share comes within the bound of fairness, and of its turns every second is standard work's."""
    lead_s = 2.0
    _, longest = _serve(orgs, slots=slots, lead_s=lead_s, until_s=150.0)
    weights = sum(weight for _, weight, *_ in orgs)
    for (org, _), pause_s in longest.items():
        cost, weight, *_ = orgs[org]
        behind_s = sum(
            to * (lead_s + (slots + 1) * (cost / weight + of / to)) for of, to, *_ in orgs
        )
        assert pause_s <= (2 * behind_s + 2 * cost * weights / weight) / slots + 2 * cost + 2.0


@pytest.mark.parametrize("lead_s", [0.0, 10.0])
def test_the_lead_can_be_nothing(lead_s: float) -> None:
    shares = [
        _share(1, [_lane(1, STANDARD, 9, 1.0)]),
        _share(2, [_lane(2, URGENT, 9, 1.0)], 0.5),
    ]
    picks = decide(shares, {"default": 4}, urgency=_urgency(lead_s)).picks
    assert Counter(pick.org_id for pick in picks) == ({1: 2, 2: 2} if lead_s == 0 else {2: 4})
