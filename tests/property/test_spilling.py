"""Properties of spill and reserve: own work first, nothing idle that may help, kept and reserved slots stay free."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from millpond.engine.admission import Decision, Lane, Share, Terms, admit
from millpond.engine.spilling import Spill

QUEUES = ("default", "llm", "sql")


@dataclass(frozen=True)
class Case:
    """What a claim finds: how much each org has ready in each queue, free slots, and what the operator said."""

    ready: Mapping[str, Sequence[int]]
    free: Mapping[str, int]
    spill: Spill

    def shares(self, depth: int = 1000) -> list[Share]:
        return [
            _share(queue, nth, ready, depth)
            for queue, orgs in self.ready.items()
            for nth, ready in enumerate(orgs, 1)
        ]

    @property
    def terms(self) -> Terms:
        return self.spill.terms(self.free, self.free)

    def helpers_of(self, queue: str) -> set[str]:
        return {helper for helper, helped in self.spill.helps.items() if queue in helped}


def _share(queue: str, org_id: int, ready: int, depth: int = 1000, virtual_s: float = 0.0) -> Share:
    seen = min(ready, depth)
    base = 1_000_000 * (QUEUES.index(queue) + 1) + 1000 * org_id
    lane = Lane(
        lane_id=QUEUES.index(queue),
        offset_us=0,
        ranks=list(range(seen)),
        items=[uuid.UUID(int=base + nth) for nth in range(seen)],
        is_whole=ready < depth,
        estimate_s=1.0,
    )
    return Share(queue=queue, org_id=org_id, weight=1.0, virtual_s=virtual_s, lanes=[lane])


counts = st.fixed_dictionaries({queue: st.integers(0, 12) for queue in QUEUES})
helps = st.fixed_dictionaries(
    {},
    optional={
        queue: st.lists(
            st.sampled_from([one for one in QUEUES if one != queue]), min_size=1, unique=True
        )
        for queue in QUEUES
    },
)
spills = st.builds(Spill, helps=helps, keep=counts, reserve=st.just({}))
cases = st.builds(
    Case,
    ready=st.fixed_dictionaries(
        {queue: st.lists(st.integers(0, 12), max_size=3) for queue in QUEUES}
    ),
    free=counts,
    spill=spills,
)


def _taken(shares: list[Share], decision: Decision) -> tuple[Counter[str], Counter[str]]:
    """Return how many slots of each queue own work took, and how many the work of others."""
    queue_of = {item: share.queue for share in shares for item in share.lanes[0].items}
    own: Counter[str] = Counter()
    lent: Counter[str] = Counter()
    for pick in decision.picks:
        if pick.helper is None:
            own[queue_of[pick.item_id]] += 1
        else:
            assert pick.helper != queue_of[pick.item_id]
            lent[pick.helper] += 1
    return own, lent


@given(cases)
def test_own_work_goes_first_and_no_slot_is_used_twice(case: Case) -> None:
    shares = case.shares()
    own, lent = _taken(shares, decision := admit(shares, case.free, case.terms))
    for queue in QUEUES:
        assert own[queue] == min(case.free[queue], sum(case.ready[queue]))
        assert own[queue] + lent[queue] <= case.free[queue]
    assert len({pick.item_id for pick in decision.picks}) == len(decision.picks)


@given(cases)
def test_lent_slots_go_where_the_policy_says_and_leave_what_is_kept(case: Case) -> None:
    shares = case.shares()
    decision = admit(shares, case.free, case.terms)
    own, lent = _taken(shares, decision)
    queue_of = {item: share.queue for share in shares for item in share.lanes[0].items}
    for pick in decision.picks:
        assert pick.helper is None or queue_of[pick.item_id] in case.spill.helps[pick.helper]
    for queue in lent:
        assert case.free[queue] - own[queue] - lent[queue] >= case.spill.keep[queue]


@given(cases)
def test_nothing_waits_while_a_slot_that_may_help_it_is_idle(case: Case) -> None:
    shares = case.shares()
    own, lent = _taken(shares, admit(shares, case.free, case.terms))
    for share in shares:
        if share.lanes[0].is_spent:
            continue
        for queue in {share.queue, *case.helpers_of(share.queue)}:
            kept = 0 if queue == share.queue else case.spill.keep[queue]
            assert case.free[queue] - own[queue] - lent[queue] <= kept


@given(cases, st.integers(1, 4))
def test_a_queue_of_which_more_may_be_ready_lends_nothing(case: Case, depth: int) -> None:
    """Claims that read less at a time, one after the other, leave nothing of its own behind a slot that was lent."""
    shares = case.shares(depth)
    decision = admit(shares, case.free, case.terms)
    _, lent = _taken(shares, decision)
    for queue in lent:
        own = [share.lanes[0] for share in shares if share.queue == queue]
        assert all(lane.is_spent and lane.is_whole for lane in own)
    unread = Case(case.ready, case.free, case.spill).terms
    terms = Terms(helps=unread.helps, kept=unread.kept, unread=frozenset(QUEUES))
    assert not any(pick.helper for pick in admit(case.shares(), case.free, terms).picks)


@given(cases)
def test_orgs_take_lent_slots_in_fair_order(case: Case) -> None:
    """Of equal orgs that have more waiting none got more than one more than another, whosever slots these were."""
    shares = case.shares()
    admit(shares, case.free, case.terms)
    for queue in QUEUES:
        members = [share.lanes[0] for share in shares if share.queue == queue]
        most = max((lane.taken for lane in members), default=0)
        for lane in members:
            assert lane.is_spent or lane.taken >= most - 1


@given(cases, st.integers(0, 30))
def test_what_is_kept_counts_the_slots_that_a_claim_does_not_ask_for(
    case: Case, beyond: int
) -> None:
    free = {queue: slots + beyond for queue, slots in case.free.items()}
    shares = case.shares()
    own, lent = _taken(shares, admit(shares, case.free, case.spill.terms(free, case.free)))
    for queue in lent:
        assert free[queue] - own[queue] - lent[queue] >= case.spill.keep[queue]


# Reserve


def _reserved(
    virtual_s: Sequence[float], slots: int, reserve: int, clock_s: float
) -> tuple[list[Share], Decision]:
    shares = [_share("sql", nth, 20, 1000, at_s) for nth, at_s in enumerate(virtual_s, 1)]
    terms = Terms(reserved={"sql": reserve}, clocks={"sql": clock_s})
    return shares, admit(shares, {"sql": slots}, terms)


times = st.lists(st.sampled_from([0.0, 3.0, 5.0, 8.0]), min_size=1, max_size=4)


@given(times, st.integers(0, 12), st.integers(0, 6), st.sampled_from([0.0, 4.0, 8.0]))
def test_reserved_slots_go_to_those_alone_who_would_go_before_a_newcomer(
    virtual_s: list[float], slots: int, reserve: int, clock_s: float
) -> None:
    _, decision = _reserved(virtual_s, slots, reserve, clock_s)
    left, clock = slots, clock_s
    now = dict(enumerate(virtual_s, 1))
    for pick in decision.picks:
        assert left > reserve or now[pick.org_id] <= clock
        clock = max(clock, now[pick.org_id])
        now[pick.org_id] += 1.0
        left -= 1
    assert left <= reserve
    assert left == 0 or min(now.values()) > clock
    assert decision.is_held_back == (left > 0)


@given(times, st.integers(1, 12), st.integers(1, 6))
def test_a_newcomer_finds_a_reserved_slot_however_much_another_has_waiting(
    virtual_s: list[float], slots: int, reserve: int
) -> None:
    """After a claim that gave others all they could have, an org that comes now starts at the clock, and goes."""
    clock_s = max(virtual_s)
    ahead = [clock_s + 1.0 + nth / 8 for nth in range(len(virtual_s))]
    shares, decision = _reserved(ahead, slots, reserve, clock_s)
    left = slots - len(decision.picks)
    assert left == min(slots, reserve)
    clock_s = max(clock_s, decision.clocks.get("sql", 0.0))
    came = _share("sql", 9, 1, 1000, clock_s)
    terms = Terms(reserved={"sql": left}, clocks={"sql": clock_s})
    later = admit([*shares, came], {"sql": left}, terms)
    assert [pick.org_id for pick in later.picks] == [9]


@given(cases, st.integers(1, 6))
def test_reserved_slots_are_not_lent(case: Case, reserve: int) -> None:
    spill = Spill(helps=case.spill.helps, reserve=dict.fromkeys(QUEUES, reserve))
    terms = spill.terms(case.free, case.free)
    shares = case.shares()
    own, lent = _taken(shares, admit(shares, case.free, terms))
    for queue in lent:
        assert case.free[queue] - own[queue] - lent[queue] >= reserve
