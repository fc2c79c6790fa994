"""Properties of steps that ride in rooms that several queues need: in turn with lanes, and charged as these."""

from __future__ import annotations

import heapq
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.accounts import Crossing
from millpond.engine.admission import Lane, Room, Share
from millpond.engine.seats import Elder, Line, Want, give_back
from millpond.engine.turns import decide

QUEUES = ("default", "llm", "sql")


@dataclass(frozen=True)
class Work:
    """What an org has to do: whole runs in a queue, or so many steps of runs that have slots already."""

    cost_s: float
    weight: float
    steps: int
    since_us: int


def _lane(org_id: int, count: int, room: Room, cost_s: float) -> Lane:
    return Lane(
        lane_id=org_id,
        offset_us=0,
        ranks=list(range(count)),
        items=[uuid.UUID(int=1000 * org_id + nth) for nth in range(count)],
        is_whole=True,
        estimate_s=cost_s,
        rooms=[room],
    )


def _claim(
    work: Mapping[tuple[int, str], Work], room: Room, crossing: Crossing, free: Mapping[str, int]
) -> tuple[list[Share], list[Want]]:
    """Let one claim decide; the orgs of steps always have as many in line as they have branches."""
    shares = [
        Share(
            queue=queue,
            org_id=org,
            weight=one.weight,
            virtual_s=0.0,
            lanes=[_lane(org, room.left, room, one.cost_s)],
        )
        for (org, queue), one in work.items()
        if not one.steps
    ]
    wants = [
        Want(
            rooms=[room],
            org_id=org,
            queue=queue,
            since_us=one.since_us + nth,
            crossings=[crossing],
            use_s=one.cost_s / one.weight,
        )
        for (org, queue), one in work.items()
        for nth in range(one.steps)
    ]
    line = Line(wants, (), shares, free)
    line.begin()
    decide(shares, free, crossings=[crossing])
    line.finish()
    return shares, wants


def _serve(work: Mapping[tuple[int, str], Work], size: int, until_s: float) -> dict[int, float]:
    """Serve endless work that needs one key of so many places; returns for how long each org had one."""
    at_s: dict[int, float] = {}
    clock_s = now = 0.0
    service = dict.fromkeys({org for org, _ in work}, 0.0)
    running: list[tuple[float, int, float, int]] = []
    nth = 0
    while now < until_s:
        room = Room(left=size - len(running), name="a")
        crossing = Crossing(
            room=room, since_s=clock_s, virtual_s=at_s, waiting={org for org, _ in work}
        )
        shares, wants = _claim(work, room, crossing, dict.fromkeys(QUEUES, size))
        at_s, clock_s = at_s | crossing.reached(shares), crossing.clock_s
        went = [
            (share.org_id, share.queue) for share in shares for _ in range(share.lanes[0].taken)
        ]
        went += [(want.org_id, want.queue) for want in wants if want.has_gone]
        for place in went:
            nth += 1
            heapq.heappush(running, (now + work[place].cost_s, nth, now, place[0]))
        assert len(running) == size, "no more than there are, and none stays empty"
        now = running[0][0]
        while running and running[0][0] <= now:
            end, _, began, org = heapq.heappop(running)
            service[org] += end - began
    for _, _, began, org in running:
        service[org] += now - began
    return service


works = st.dictionaries(
    st.integers(1, 5),
    st.tuples(
        st.sampled_from(QUEUES),
        st.sampled_from([0.1, 0.5, 2.0]),
        st.sampled_from([1.0, 2.0]),
        st.sampled_from([0, 0, 8, 40]),
        st.integers(-100, 100),
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(works, st.integers(1, 5))
def test_service_of_steps_and_runs_under_a_key_differs_within_the_stated_bound(
    drawn: dict[int, tuple[str, float, float, int, int]], size: int
) -> None:
    """Whoever came first, and however many steps an org has in line side by side."""
    work = {
        (org, queue): Work(cost_s, weight, steps, since_us)
        for org, (queue, cost_s, weight, steps, since_us) in drawn.items()
    }
    service = _serve(work, size, until_s=15.0)
    for (one, _), mine in work.items():
        for (other, _), theirs in work.items():
            bound = (size + 1) * (mine.cost_s / mine.weight + theirs.cost_s / theirs.weight)
            differ = abs(service[one] / mine.weight - service[other] / theirs.weight)
            assert differ <= bound + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50), st.booleans()), max_size=12),
    st.dictionaries(st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0, 9.0])),
    st.integers(0, 6),
)
def test_a_place_that_is_left_is_not_charged_and_one_that_is_given_is(
    drawn: list[tuple[int, int, bool]], stands: dict[int, float], left: int
) -> None:
    room = Room(left=left, name="a")
    crossing = Crossing(room=room, since_s=0.0, virtual_s=stands)
    wants = [
        Want(
            rooms=[room],
            org_id=org,
            queue="llm",
            since_us=since,
            crossings=[crossing],
            use_s=1.0,
            is_here=here,
        )
        for org, since, here in drawn
    ]
    line = Line(wants)
    line.begin()
    line.finish()
    assert sum(want.has_gone for want in wants) == min(left, len(wants))
    went = Counter(want.org_id for want in wants if want.has_gone and want.is_here)
    charged = {org: at - crossing.began_s(org) for org, at in crossing.reached(()).items()}
    assert charged == went
    everyone = Counter(want.org_id for want in wants if want.has_gone)
    for want in wants:
        if not want.has_gone:
            mine = stands.get(want.org_id, 0.0) + everyone[want.org_id]
            last = [
                stands.get(org, 0.0) + n - 1 for org, n in everyone.items() if org != want.org_id
            ]
            assert all(began <= mine for began in last), "who has used less goes first"
    for want in wants:
        if want.has_gone and want.is_here:
            give_back(want)
    assert not any(at - crossing.began_s(org) for org, at in crossing.reached(()).items()), (
        "what does not begin is not charged"
    )


def test_what_other_workers_could_let_go_counts_by_what_its_org_will_have_used() -> None:
    """Of four items of an elder org two stand before the step: by then it has used as much as the step's org."""
    room = Room(left=3, name="a")
    crossing = Crossing(room=room, since_s=0.0, virtual_s={1: 2.0})
    want = Want(rooms=[room], org_id=1, queue="llm", since_us=100, crossings=[crossing], use_s=1.0)
    elder = Elder("a", 2, 7, "sql", 0, 0.0, 8, [101, 102, 103, 104], use_s=1.0)
    line = Line([want], [elder])
    line.begin()
    line.finish()
    assert want.has_gone
    room.left, want.has_gone = 2, False
    Line([want], [elder]).finish()
    assert not want.has_gone
