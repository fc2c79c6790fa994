"""Properties of limits on tokens: bounds on use, settled both ways, all rooms or none, no starvation by small needs."""

from __future__ import annotations

import uuid

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.admission import Lane, Room, Share, admit, pass_over
from millpond.engine.keeping import Waiting, keep_rooms
from millpond.engine.keying import check_keys
from millpond.engine.pacing import allowed, corrected, meter_us, next_at_us, repaced, spent
from millpond.engine.rules import MAX_SPAN_S, RoomId, Rule, Rules
from millpond.engine.seats import Elder, Line, Want, give_back
from millpond.engine.tokens import Need, need_at, need_of, rounded, stand

T0 = 1_000_000_000_000


def tokens(maximum: int, period_s: float = 60.0, burst: int | None = None) -> Rule:
    return Rule(
        owner=0,
        key="provider:x",
        kind="tokens",
        maximum=maximum,
        period_s=period_s,
        burst=burst or maximum,
    )


@settings(max_examples=300)
@given(
    st.integers(1, 5_000_000),
    st.sampled_from([1.0, 60.0, 3600.0]),
    st.floats(0.1, 3.0),
    st.lists(
        st.tuples(
            st.integers(0, 90_000_000),
            st.floats(0.001, 1.0),
            st.floats(0.0, 3.0),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_no_window_uses_more_than_the_rate_the_burst_and_the_stated_debt(
    maximum: int, period_s: float, share: float, acts: list[tuple[int, float, float, bool]]
) -> None:
    """The debt of a window: what leases had reserved that were live as it began, and what is owed as it ends."""
    rule = tokens(maximum, period_s, max(1, int(maximum * share)))
    now, tat = T0, None
    live: list[tuple[int, int]] = []
    # After each act: the time, what was told by it, what is reserved, what is owed.
    told: list[tuple[int, int, int, int]] = []
    for pause_us, of_burst, of_need, ends in acts:
        now += pause_us
        used, need = 0, max(1, int(rule.at_once * of_burst))
        if ends and live:
            reserved, used = live.pop(0)
            tat = corrected(rule, tat, now, used - reserved)
        elif allowed(rule, tat, now) >= need:
            tat = spent(rule, tat, now, need)
            live.append((need, int(need * of_need)))
        elif tat is not None:
            at = next_at_us(rule, meter_us(rule, tat, now), need)
            assert allowed(rule, tat, at) >= need
            assert allowed(rule, tat, at - 1) < need
        left = allowed(rule, tat, now)
        told.append((now, used, sum(one for one, _ in live), max(0, -left)))
    for nth, (start, _, reserved, _) in enumerate(told):
        window = 0
        for end, used, _, owed in told[nth + 1 :]:
            window += used
            earned = (end - start) / 1e6 * maximum / period_s
            assert window <= earned + rule.at_once + reserved + owed + 1


@given(
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_owed(
    maximum: int, need: int, used: int, before: int
) -> None:
    rule = tokens(maximum, 1.0, 4 * 10**6)
    tat = spent(rule, spent(rule, None, T0, before), T0, need)
    settled = corrected(rule, tat, T0, used - need)
    assert abs(allowed(rule, settled, T0) - (rule.at_once - before - used)) <= 1 + 3 / rule.pace
    assert allowed(rule, settled, T0) <= rule.at_once
    # Later than all of it has come back by itself there is no more than the whole of it.
    late = tat + 1_000_000
    assert allowed(rule, corrected(rule, tat, late, -need), late) == rule.at_once


@given(
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.sampled_from([1.0, 60.0, 86_400.0]),
    st.integers(0, 10**7),
    st.integers(1, 10**7),
)
def test_what_is_used_stays_used_when_a_limit_becomes_another(
    first: int, second: int, period_s: float, used: int, burst: int
) -> None:
    old, new = tokens(first, 60.0, burst), tokens(second, period_s, burst)
    if max(used, burst) * max(old.pace, new.pace) >= MAX_SPAN_S * 1e6:
        return
    tat = spent(old, None, T0, used)
    # Meters are in whole microseconds.
    grain = 2 + 2 / old.pace + 2 / new.pace
    assert abs(allowed(new, repaced(new, tat, old.pace, T0), T0) - (burst - used)) <= grain


@given(
    st.integers(1, 2**31 - 1),
    st.floats(1e-3, 86_400 * 31),
    st.integers(1, 2**31 - 1),
    st.none() | st.integers(0, 2**62),
    st.integers(0, 2**52),
    st.integers(-(2**40), 2**40),
)
def test_a_meter_of_tokens_fits_its_column(
    maximum: int, period_s: float, burst: int, tat: int | None, now: int, delta: int
) -> None:
    rule = tokens(maximum, period_s, burst)
    assert rule.earned(rule.span_us) >= burst or rule.span_us == MAX_SPAN_S * 1_000_000
    assert 0 <= corrected(rule, tat, now, delta) < 2**63
    assert (repaced(rule, tat, 0.5, now) or 0) < 2**63


NAMES = "abc"


@st.composite
def grounds(draw: st.DrawFn) -> tuple[dict[str, Room], list[Share], int]:
    """Rooms, some of them weighed, and lanes of several orgs with needs of their own, some of them of steps in line."""
    rooms = {
        name: Room(
            left=draw(st.integers(-5, 60 if draw(st.booleans()) else 4)),
            name=name,
            is_weighed=draw(st.booleans()),
        )
        for name in NAMES
    }
    shares = []
    for org_id in range(1, draw(st.integers(1, 4)) + 1):
        lanes = []
        for lane_id in range(draw(st.integers(1, 3))):
            mine = sorted(draw(st.frozensets(st.sampled_from(NAMES), max_size=3)))
            needs = draw(st.none() | st.dictionaries(st.sampled_from(NAMES), st.integers(1, 20)))
            count = draw(st.integers(0, 5))
            lanes.append(
                Lane(
                    lane_id=lane_id,
                    offset_us=0,
                    ranks=list(range(count)),
                    items=[
                        uuid.UUID(int=10_000 * org_id + 100 * lane_id + n) for n in range(count)
                    ],
                    is_whole=True,
                    estimate_s=1.0,
                    rooms=[rooms[name] for name in mine],
                    need=draw(st.integers(1, 20)),
                    needs=needs,
                )
            )
        shares.append(Share(queue="default", org_id=org_id, weight=1.0, virtual_s=0.0, lanes=lanes))
    keep_rooms(
        [
            Waiting(
                org_id=share.org_id,
                lane_id=lane.lane_id,
                since_us=draw(st.integers(0, 3)),
                rooms=lane.rooms,
                need=lane.need,
                needs=lane.needs,
            )
            for share in shares
            for lane in share.lanes
            if draw(st.booleans())
        ]
    )
    return rooms, shares, draw(st.integers(0, 20))


def taken_of(room: Room, shares: list[Share]) -> int:
    return sum(
        lane.taken * lane.cost(room)
        for share in shares
        for lane in share.lanes
        if any(one is room for one in lane.rooms)
    )


@given(grounds(), st.integers(0, 3))
def test_items_take_what_they_need_of_every_room_or_nothing_and_give_it_back_when_missed(
    at: tuple[dict[str, Room], list[Share], int], missed: int
) -> None:
    rooms, shares, slots = at
    before = {name: room.left for name, room in rooms.items()}
    decision = admit(shares, {"default": slots})
    for name, room in rooms.items():
        assert taken_of(room, shares) == before[name] - room.left == room.went
        assert room.went == 0 or room.left >= 0
    pass_over(shares, decision.picks[:missed], again=False)
    for name, room in rooms.items():
        assert taken_of(room, shares) == before[name] - room.left == room.went


@given(grounds())
def test_what_is_left_goes_but_for_what_is_kept(
    at: tuple[dict[str, Room], list[Share], int],
) -> None:
    _, shares, slots = at
    decision = admit(shares, {"default": slots})
    if len(decision.picks) == slots:
        return
    for share in shares:
        for lane in share.lanes:
            if not lane.is_spent:
                place = (share.org_id, lane.lane_id)
                short = [room for room in lane.rooms if not room.has_for(place, lane.cost(room))]
                assert short
                assert all(
                    room.left < lane.cost(room) or room.kept_for not in (None, place)
                    for room in short
                )


@given(
    grounds(),
    st.lists(
        st.tuples(st.frozensets(st.sampled_from(NAMES), min_size=1), st.integers(1, 20)), max_size=8
    ),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 20)),
    st.sets(st.integers(0, 7)),
)
def test_tries_take_what_they_need_of_what_lines_leave_or_nothing_and_give_it_back(
    at: tuple[dict[str, Room], list[Share], int],
    asked: list[tuple[frozenset[str], int]],
    ahead: dict[str, int],
    lost: set[int],
) -> None:
    rooms, shares, slots = at
    admit(shares, {"default": slots})
    before = {name: room.left for name, room in rooms.items()}
    went = {name: room.went for name, room in rooms.items()}
    wants = [Want(rooms=[rooms[name] for name in sorted(one)], need=need) for one, need in asked]
    # Of each room somebody else could take so much, who has a slot for it.
    elders = [Elder(name, 9, 1, f"of {name}", 0, 0.0, 1, [0], cost) for name, cost in ahead.items()]
    Line(wants, elders).finish()

    def check(seated: list[Want]) -> None:
        for name, room in rooms.items():
            took = sum(room.cost(one.need) for one in seated if room in one.rooms)
            assert took == before[name] - room.left == room.went - went[name]
            kept = 0 if room.kept_for is None else room.kept
            assert took == 0 or room.left >= kept + ahead.get(name, 0), "theirs to take now"

    seated = [one for one in wants if one.full is None]
    check(seated)
    for want in wants:
        if (room := want.full) is not None:
            kept = 0 if room.kept_for is None else room.kept
            assert room.left - kept - ahead.get(room.name, 0) < room.cost(want.need)
    for nth in lost & set(range(len(seated))):
        give_back(seated[nth])
    check([one for nth, one in enumerate(seated) if nth not in lost])


@settings(max_examples=50)
@given(st.integers(2, 50), st.integers(1, 49))
def test_small_needs_do_not_keep_a_large_one_waiting_for_ever(large: int, small: int) -> None:
    """Ten tokens a second; a lane of small needs always has work, the head of the large one waits."""
    rule, now, tat = tokens(10, 1.0, 50), T0, spent(tokens(10, 1.0, 50), None, T0, 50)
    lanes = {1: min(small, large), 2: large}
    for _ in range(400):
        now += 100_000
        room = Room(left=allowed(rule, tat, now), name="t", is_weighed=True)
        keep_rooms([Waiting(org_id=2, lane_id=2, since_us=0, rooms=[room], need=large)])
        shares = [
            Share(
                queue="default",
                org_id=org_id,
                weight=1.0,
                virtual_s=float(org_id),
                lanes=[
                    Lane(
                        lane_id=org_id,
                        offset_us=0,
                        ranks=list(range(9)),
                        items=[uuid.UUID(int=nth) for nth in range(9)],
                        is_whole=False,
                        estimate_s=1.0,
                        rooms=[room],
                        need=need,
                    )
                ],
            )
            for org_id, need in lanes.items()
        ]
        picks = admit(shares, {"default": 20}).picks
        tat = spent(rule, tat, now, room.went)
        if any(pick.org_id == 2 for pick in picks):
            return
    raise AssertionError("the large need was never met")


@given(st.integers(0, 10**9))
def test_needs_are_rounded_up_to_two_digits(need: int) -> None:
    made = rounded(need)
    assert need <= made <= need * 1.1 + 1
    assert len(str(made).rstrip("0")) <= 2 or made == 0


@given(st.integers(1, 10**9), st.booleans())
def test_a_stand_tells_its_room_and_its_need(count: int, is_declared: bool) -> None:
    room = RoomId("tokens", 0, 7, "model:m×provider:x")
    need = Need(count, is_declared=is_declared)
    name = stand(room.text, need)
    assert need_at(name) == need
    assert RoomId.parse(name) == room
    assert need_at(room.text) is None


def test_the_need_of_a_run_goes_before_that_of_its_flow_and_names_no_room() -> None:
    declared = check_keys(["provider:x"], tokens=2345)
    assert need_of(declared) == 2400
    assert need_of(check_keys(["model:m"], declared=declared)) == 2400
    assert check_keys(["model:m"], declared=declared, tokens=70) == (
        "model:m",
        "provider:x",
        "tokens:70",
    )
    rules = Rules.of([tokens(10)])
    assert [place.room.key for place in rules.places(1, "default", "f@1", declared)] == [
        "provider:x"
    ]
