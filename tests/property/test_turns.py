"""Properties of rooms that lanes of several queues need: places in turn, work conserved, nobody starved."""

from __future__ import annotations

import heapq
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.accounts import Crossing
from millpond.engine.admission import Decision, Lane, Pick, Room, Share, admit
from millpond.engine.turns import decide

QUEUES = ("default", "llm", "sql")
NAMES = "abc"


def _lane(org_id: int, lane_id: int, count: int, rooms: Sequence[Room], cost: float = 1.0) -> Lane:
    return Lane(
        lane_id=lane_id,
        offset_us=0,
        ranks=list(range(count)),
        items=[uuid.UUID(int=100_000 * org_id + 100 * lane_id + nth) for nth in range(count)],
        is_whole=True,
        estimate_s=cost,
        rooms=rooms,
    )


@dataclass
class Ground:
    """Orgs in several queues, rooms that their lanes need, and where orgs stand in these."""

    rooms: dict[str, Room]
    before: dict[str, int]
    shares: list[Share]
    slots: dict[str, int]
    crossings: list[Crossing]

    def lanes(self) -> list[tuple[Share, Lane]]:
        return [(share, lane) for share in self.shares for lane in share.lanes]


@st.composite
def grounds(draw: st.DrawFn, *, most_rooms: int = 3) -> Ground:
    rooms = {name: Room(left=draw(st.integers(0, 5)), name=name) for name in NAMES}
    shares: list[Share] = []
    lane_id = 0
    for org_id in range(1, draw(st.integers(2, 5)) + 1):
        for queue in sorted(draw(st.sets(st.sampled_from(QUEUES), min_size=1))):
            lanes = []
            for _ in range(draw(st.integers(1, 3))):
                lane_id += 1
                needs = draw(st.sets(st.sampled_from(NAMES), max_size=most_rooms))
                count, cost = draw(st.integers(0, 5)), draw(st.sampled_from([0.5, 1.0, 3.0]))
                lane = _lane(org_id, lane_id, count, [rooms[one] for one in sorted(needs)], cost)
                lane.is_whole = draw(st.booleans())
                lanes.append(lane)
            virtual_s = draw(st.sampled_from([0.0, 1.0, 7.5]))
            shares.append(
                Share(queue=queue, org_id=org_id, weight=1.0, virtual_s=virtual_s, lanes=lanes)
            )
    crossings = [
        Crossing(
            room=rooms[name],
            since_s=1.0,
            virtual_s={org: draw(st.sampled_from([0.0, 1.0, 2.0, 9.0])) for org in range(1, 6)},
        )
        for name in sorted(draw(st.sets(st.sampled_from(NAMES), min_size=1)))
    ]
    slots = {queue: draw(st.integers(0, 6)) for queue in QUEUES}
    before = {name: room.left for name, room in rooms.items()}
    return Ground(rooms, before, shares, slots, crossings)


@settings(max_examples=300)
@given(grounds())
def test_no_more_go_than_slots_and_rooms_have_and_items_take_all_rooms_or_none(at: Ground) -> None:
    decision = decide(at.shares, at.slots, crossings=at.crossings)
    took, by_queue = Counter[str](), Counter[str]()
    for share, lane in at.lanes():
        by_queue[share.queue] += lane.taken
        took.update({room.name: lane.taken for room in lane.rooms})
    for name, room in at.rooms.items():
        assert took[name] <= max(0, at.before[name])
        assert room.left == at.before[name] - took[name]
    assert all(by_queue[queue] <= slots for queue, slots in at.slots.items())
    assert len(decision.picks) == len(set(decision.picks)) == sum(by_queue.values())


@settings(max_examples=300)
@given(grounds())
def test_what_could_go_goes_and_nothing_stays_aside(at: Ground) -> None:
    decide(at.shares, at.slots, crossings=at.crossings)
    went = Counter[str]()
    for share, lane in at.lanes():
        went[share.queue] += lane.taken
    for share, lane in at.lanes():
        place = (share.org_id, lane.lane_id)
        assert lane.full is None or not lane.full.has_for(place)
        assert lane.was_full or lane.full is None
        has_slots = went[share.queue] < at.slots[share.queue]
        if has_slots and not lane.is_spent and not is_cut(share):
            assert any(not room.has_for(place) for room in lane.rooms)


@settings(max_examples=300)
@given(grounds(most_rooms=1))
def test_of_a_crossing_the_next_place_goes_to_who_has_used_it_least(at: Ground) -> None:
    """Whoever is left without, though its queue had slots to the end, has used no less than those who got a place.

    Who had more than was read goes on in the next claim.
    """
    decision = decide(at.shares, at.slots, crossings=at.crossings)
    went = Counter(pick_queue(at, pick) for pick in decision.picks)
    for one in at.crossings:
        reached = one.reached(at.shares)
        for share, lane in at.lanes():
            has_slots = went[share.queue] < at.slots[share.queue]
            if not has_slots or lane.full is not one.room or is_cut(share):
                continue
            mine = reached.get(share.org_id, one.began_s(share.org_id))
            assert all(
                began <= mine
                for org, began in _last_began(at, decision, one)
                if org != share.org_id
            )


def is_cut(share: Share) -> bool:
    """Whether of a lane of an org all was taken that was read, and more may stand there."""
    return any(one.is_spent and not one.is_whole and one.taken for one in share.lanes)


def pick_queue(at: Ground, pick: Pick) -> str:
    """Return the queue of a pick."""
    return next(share.queue for share, lane in at.lanes() if lane.lane_id == pick.lane_id)


def _last_began(at: Ground, decision: Decision, one: Crossing) -> list[tuple[int, float]]:
    """Return where each org stood as it got its last place in a crossing."""
    lanes = {lane.lane_id: lane for _, lane in at.lanes()}
    stands: dict[int, float] = {}
    began: dict[int, float] = {}
    for pick in decision.picks:
        lane = lanes[pick.lane_id]
        if one.room in lane.rooms:
            began[pick.org_id] = stands.get(pick.org_id, one.began_s(pick.org_id))
            stands[pick.org_id] = began[pick.org_id] + lane.estimate_s
    return list(began.items())


@given(grounds())
def test_without_crossings_it_is_the_admission_alone(at: Ground) -> None:
    """A crossing changes nothing where there is place for all."""
    for room in at.rooms.values():
        room.left = 1000
    picks = decide(at.shares, at.slots, crossings=at.crossings).picks
    for share, lane in at.lanes():
        share.virtual_s -= lane.taken * lane.estimate_s
        lane.taken = 0
    plain = admit(at.shares, at.slots).picks
    assert sorted(picks) == sorted(plain)


def _serve(
    work: Mapping[tuple[int, str], tuple[float, float]], *, size: int, slots: int, until_s: float
) -> tuple[dict[int, float], dict[int, float]]:
    """Serve endless lanes (org, queue) of (cost, weight) that need one key; returns service and longest run by org."""
    orgs = {org for org, _ in work}
    virtual = dict.fromkeys(work, 0.0)
    at_s, clock_s = dict.fromkeys(orgs, 0.0), 0.0
    service = dict.fromkeys(orgs, 0.0)
    running: list[tuple[float, int, float, int, str]] = []
    now, nth = 0.0, 0
    while now < until_s:
        room = Room(left=size - len(running), name="a")
        busy = Counter(queue for *_, queue in running)
        shares = [
            Share(
                queue=queue,
                org_id=org,
                weight=weight,
                virtual_s=virtual[org, queue],
                lanes=[_lane(org, 1, slots, [room], cost)],
            )
            for (org, queue), (cost, weight) in work.items()
        ]
        crossing = Crossing(room=room, since_s=clock_s, virtual_s=at_s)
        free = {queue: slots - busy[queue] for _, queue in work}
        decide(shares, free, crossings=[crossing])
        at_s, clock_s = at_s | crossing.reached(shares), crossing.clock_s
        for share in shares:
            virtual[share.org_id, share.queue] = share.virtual_s
            cost = work[share.org_id, share.queue][0]
            for _ in range(share.lanes[0].taken):
                nth += 1
                heapq.heappush(running, (now + cost, nth, now, share.org_id, share.queue))
        assert len(running) == size, "places stay empty though work waits"
        now = running[0][0]
        while running and running[0][0] <= now:
            end, _, began, org, _ = heapq.heappop(running)
            service[org] += end - began
    for _, _, began, org, _ in running:
        service[org] += now - began
    longest = {org: max(cost for (of, _), (cost, _) in work.items() if of == org) for org in orgs}
    return service, longest


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.integers(1, 5), st.sampled_from(QUEUES)),
        st.sampled_from([0.1, 0.5, 2.0]),
        min_size=2,
        max_size=8,
    ),
    st.dictionaries(st.integers(1, 5), st.sampled_from([1.0, 2.0, 4.0])),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_service_under_a_key_of_several_queues_differs_within_the_stated_bound(
    costs: dict[tuple[int, str], float], weights: dict[int, float], size: int, more: int
) -> None:
    """For S places: |Wf/rf - Wm/rm| <= (S + 1) * (lf/rf + lm/rm) over all queues, whichever the orgs' work is in."""
    work = {place: (cost, weights.get(place[0], 1.0)) for place, cost in costs.items()}
    service, longest = _serve(work, size=size, slots=size + more, until_s=20.0)
    for one, mine in service.items():
        for other, theirs in service.items():
            of, to = weights.get(one, 1.0), weights.get(other, 1.0)
            bound = (size + 1) * (longest[one] / of + longest[other] / to)
            assert abs(mine / of - theirs / to) <= bound + 1e-6


def test_the_first_queue_does_not_take_all_places() -> None:
    """As it does by the admission alone, which serves queue by queue."""
    room = Room(left=4, name="a")
    shares = [
        Share(
            queue=queue, org_id=org, weight=1.0, virtual_s=0.0, lanes=[_lane(org, org, 8, [room])]
        )
        for org, queue in ((1, "default"), (2, "llm"))
    ]
    picks = decide(
        shares, {"default": 8, "llm": 8}, crossings=[Crossing(room=room, since_s=0.0)]
    ).picks
    assert Counter(pick.org_id for pick in picks) == {1: 2, 2: 2}


def test_those_that_wait_for_each_other_go() -> None:
    """Each is first in one of the two rooms that both need."""
    rooms = [Room(left=1, name="a"), Room(left=1, name="b")]
    shares = [
        Share(queue=queue, org_id=org, weight=1.0, virtual_s=0.0, lanes=[_lane(org, org, 1, rooms)])
        for org, queue in ((1, "default"), (2, "llm"))
    ]
    crossings = [
        Crossing(room=room, since_s=0.0, virtual_s={org: 1.0})
        for room, org in zip(rooms, (1, 2), strict=True)
    ]
    picks = decide(shares, {"default": 1, "llm": 1}, crossings=crossings).picks
    assert [pick.org_id for pick in picks] == [1]


def test_idle_time_in_a_crossing_is_no_credit() -> None:
    crossing = Crossing(room=Room(left=1), since_s=50.0, virtual_s={1: 3.0, 2: 80.0})
    assert [crossing.began_s(org) for org in (1, 2, 3)] == [50.0, 80.0, 50.0]
