"""Properties of the pure admission: slots, order inside lanes, fairness among orgs, work conserved."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine import moved
from millpond.engine.admission import Decision, Lane, Share, Terms, admit
from millpond.engine.estimates import TURN_S


def _share(queue: str, org_id: int, weight: float, lanes: list[list[int]], cost: float) -> Share:
    return Share(
        queue=queue,
        org_id=org_id,
        weight=weight,
        virtual_s=0.0,
        lanes=[
            Lane(
                lane_id=nth,
                offset_us=0,
                ranks=sorted(ranks),
                items=[uuid.UUID(int=1000 * org_id + 100 * nth + k) for k in range(len(ranks))],
                is_whole=True,
                estimate_s=cost,
            )
            for nth, ranks in enumerate(lanes)
        ],
    )


ranks = st.lists(st.integers(0, 10_000), max_size=12, unique=True)
shares = st.lists(
    st.builds(
        _share,
        queue=st.sampled_from(["default", "llm"]),
        org_id=st.integers(1, 8),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
        lanes=st.lists(ranks, min_size=1, max_size=3),
        cost=st.sampled_from([0.0003, 0.0009, 0.01, 1.0]),
    ),
    max_size=8,
    unique_by=lambda share: (share.queue, share.org_id),
)
free = st.fixed_dictionaries({"default": st.integers(0, 20), "llm": st.integers(0, 20)})


def _by_queue(members: list[Share], decision: Decision) -> Counter[str]:
    counts: Counter[str] = Counter()
    for share in members:
        counts[share.queue] += sum(lane.taken for lane in share.lanes)
    assert sum(counts.values()) == len(decision.picks)
    return counts


@given(shares, free)
def test_picks_fill_free_slots_exactly_as_far_as_there_is_work(
    members: list[Share], slots: dict[str, int]
) -> None:
    waiting: Counter[str] = Counter()
    for share in members:
        waiting[share.queue] += sum(len(lane.items) for lane in share.lanes)
    counts = _by_queue(members, admit(members, slots))
    for queue in ("default", "llm"):
        assert counts[queue] == min(slots[queue], waiting[queue])


@given(shares, free)
def test_no_item_is_picked_twice_and_lanes_go_in_order(
    members: list[Share], slots: dict[str, int]
) -> None:
    decision = admit(members, slots)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for pick in decision.picks:
        seen[pick.org_id, pick.lane_id].append(pick.rank)
    for share in members:
        for lane in share.lanes:
            assert list(lane.ranks[: lane.taken]) == sorted(lane.ranks[: lane.taken])
    assert sum(map(len, seen.values())) == len(decision.picks)


@given(st.lists(ranks, min_size=1, max_size=4), st.integers(0, 30))
def test_lanes_of_one_org_go_by_the_rank_of_their_heads(lanes: list[list[int]], slots: int) -> None:
    decision = admit([_share("default", 1, 1.0, lanes, 1.0)], {"default": slots})
    picked = [pick.rank for pick in decision.picks]
    assert picked == sorted(rank for lane in lanes for rank in lane)[:slots]


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=5),
    st.lists(st.sampled_from([0.0003, 0.0009, 0.1, 0.5, 2.0]), min_size=5, max_size=5),
    st.integers(1, 40),
)
def test_service_of_backlogged_orgs_differs_by_at_most_one_item_or_turn_each(
    weights: list[float], costs: list[float], slots: int
) -> None:
    """Start-time fair queueing: |Wf/rf - Wm/rm| <= lf/rf + lm/rm for every pair with backlog; l is a turn at least."""
    members = [
        _share("default", nth + 1, weight, [list(range(50))], costs[nth])
        for nth, weight in enumerate(weights)
    ]
    admit(members, {"default": slots})
    service = [
        (share.lanes[0].taken * share.lanes[0].estimate_s / share.weight,
         max(share.lanes[0].estimate_s, TURN_S) / share.weight)
        for share in members
    ]  # fmt: skip
    for done_f, longest_f in service:
        for done_m, longest_m in service:
            assert abs(done_f - done_m) <= longest_f + longest_m + 1e-9


def test_an_org_whose_read_was_cut_goes_on_in_the_next_claim() -> None:
    share = _share("default", 1, 1.0, [[1, 2], [5, 6]], 1.0)
    share.lanes[0].is_whole = False
    decision = admit([share], {"default": 10})
    assert [pick.rank for pick in decision.picks] == [1, 2]
    assert decision.has_more


def _order(members: list[Share]) -> list[tuple[float, int]]:
    """Return where orgs with work stand, the first first."""
    return sorted(
        (share.virtual_s, share.org_id)
        for share in members
        if any(not lane.is_spent for lane in share.lanes)
    )


@given(shares, st.integers(1, 40), st.integers(1, 5))
def test_orgs_that_are_read_in_parts_go_as_if_all_were_read_at_once(
    members: list[Share], slots: int, most: int
) -> None:
    """What stands behind the horizon has its turn in the next claim, and nobody goes before it meanwhile."""
    members = [share for share in members if share.queue == "default"]
    whole = admit(deepcopy(members), {"default": slots}).picks
    parts, has_more = [], True
    while len(parts) < slots and has_more:
        places = _order(members)[:most]
        read = [one for one in members if (one.virtual_s, one.org_id) in places]
        horizons = {"default": places[-1]} if len(places) == most else {}
        decision = admit(read, {"default": slots - len(parts)}, Terms(horizons=horizons))
        has_more = decision.has_more
        assert decision.picks or not has_more
        parts += decision.picks
    assert [pick.item_id for pick in parts] == [pick.item_id for pick in whole]


def test_small_work_of_an_org_goes_together_until_its_turn_is_over() -> None:
    members = [_share("default", org_id, 1.0, [list(range(9))], 0.0009) for org_id in (1, 2)]
    members.append(_share("default", 3, 1.0, [list(range(9))], 0.02))
    decision = admit(members, {"default": 9})
    assert [pick.org_id for pick in decision.picks] == [1, 1, 2, 2, 3, 1, 1, 2, 2]
    assert decision.clocks == {"default": 0.0018}


def test_what_is_held_back_in_one_queue_hides_nothing_of_another_behind_its_horizon() -> None:
    ahead = _share("reserved", 1, 1.0, [list(range(4))], 0.02)
    ahead.virtual_s = 9.0
    read = _share("small", 2, 1.0, [[0]], 0.0001)
    terms = Terms(
        reserved={"reserved": 2},
        clocks={"reserved": 1.0},
        horizons={"small": (read.virtual_s, read.org_id)},
    )
    decision = admit([ahead, read], {"reserved": 2, "small": 4}, terms)
    assert [pick.org_id for pick in decision.picks] == [2]
    assert decision.is_held_back
    assert decision.has_more


def test_nobody_goes_from_behind_who_was_read_in_order_whoever_was_read_beside_them() -> None:
    read = [_share("default", org_id, 1.0, [[0]], 0.0001) for org_id in (1, 2, 3)]
    read[2].virtual_s = 50.0  # with interactive work, and far behind
    assert moved.horizons(read, {"default": 2}, {"default": 9}) == {"default": (0.0, 2)}
    assert moved.horizons(read, {"default": 4}, {"default": 9}) == {}
    assert moved.horizons(read, {"default": 2}, {"default": 2}) == {}


@given(shares, st.integers(1, 40))
def test_how_work_is_spread_over_orgs_is_known_where_there_was_enough_of_it_or_not_all_were_read(
    members: list[Share], slots: int
) -> None:
    """Where all were read and slots stay free there is too little work to tell, and little to read."""
    members = [share for share in members if share.queue == "default"]
    picks = admit(members, {"default": slots}).picks
    ratio = {"default": len({pick.org_id for pick in picks}) / len(picks)} if picks else {}
    is_full = len(picks) == slots
    assert moved.spread(members, {"default": slots}) == (ratio if is_full else {})
    assert moved.spread(members, {"default": slots}, {"default": (0.0, 1)}) == ratio
    assert moved.spread(members, {"default": slots}, {"other": (0.0, 1)}) == (
        ratio if is_full else {}
    )
