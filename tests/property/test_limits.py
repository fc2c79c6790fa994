"""Properties of limits: never above one, all keys or none, work conserved, nobody starved, rates kept, shares fair."""

from __future__ import annotations

import heapq
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine import pacing as limits
from millpond.engine.admission import Lane, Room, Share, admit, pass_over
from millpond.engine.keeping import Waiting, keep_rooms
from millpond.engine.keying import check_keys, parse_key
from millpond.engine.rules import RoomId, Rule, Rules
from millpond.errors import InvalidInput

NAMES = "abcd"


@dataclass
class Ground:
    """Rooms and shares of one example; `needs` are the rooms of every (org, lane)."""

    rooms: dict[str, Room]
    shares: list[Share]
    needs: dict[tuple[int, int], frozenset[str]]
    slots: int
    waiting: list[Waiting] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)

    def picked(self) -> Counter[str]:
        """How many items that need each room were taken."""
        counts: Counter[str] = Counter()
        for share in self.shares:
            for lane in share.lanes:
                for name in self.needs[share.org_id, lane.lane_id]:
                    counts[name] += lane.taken
        return counts


@st.composite
def grounds(draw: st.DrawFn) -> Ground:
    """Rooms that all orgs share, and two of each org's own."""
    rooms = {name: Room(left=draw(st.integers(-1, 5)), name=name) for name in NAMES}
    for org_id in range(1, 6):
        for name in (f"x{org_id}", f"y{org_id}"):
            rooms[name] = Room(left=draw(st.integers(-1, 3)), org_id=org_id, name=name)
    shares, needs = [], {}
    for org_id in range(1, draw(st.integers(1, 5)) + 1):
        lanes = []
        for lane_id in range(draw(st.integers(1, 3))):
            names = [*NAMES, f"x{org_id}", f"y{org_id}"]
            mine = draw(st.frozensets(st.sampled_from(names), max_size=4))
            needs[org_id, lane_id] = mine
            count = draw(st.integers(0, 6))
            # Those that are small go a few at one turn.
            cost = draw(st.sampled_from([1.0, 0.0005, 0.0001]))
            lanes.append(
                _lane(org_id, lane_id, count, [rooms[name] for name in sorted(mine)], cost)
            )
        shares.append(Share(queue="default", org_id=org_id, weight=1.0, virtual_s=0.0, lanes=lanes))
    waiting = [
        Waiting(
            org_id=org,
            lane_id=lane,
            since_us=draw(st.integers(0, 3)),
            rooms=[rooms[name] for name in sorted(needs[org, lane])],
        )
        for org, lane in needs
        if draw(st.booleans())
    ]
    keep_rooms(waiting)
    before = {name: room.left for name, room in rooms.items()}
    return Ground(rooms, shares, needs, draw(st.integers(0, 20)), waiting, before)


def _lane(org_id: int, lane_id: int, count: int, rooms: Sequence[Room], cost: float = 1.0) -> Lane:
    return Lane(
        lane_id=lane_id,
        offset_us=0,
        ranks=list(range(count)),
        items=[uuid.UUID(int=10_000 * org_id + 100 * lane_id + nth) for nth in range(count)],
        is_whole=True,
        estimate_s=cost,
        rooms=rooms,
    )


@given(grounds())
def test_no_room_takes_more_than_it_has_left_and_items_take_all_rooms_or_none(at: Ground) -> None:
    decision = admit(at.shares, {"default": at.slots})
    picked = at.picked()
    for name, room in at.rooms.items():
        assert picked[name] <= max(0, at.before[name])
        assert room.left == at.before[name] - picked[name]
    assert len(decision.picks) == sum(lane.taken for share in at.shares for lane in share.lanes)
    assert len(decision.picks) <= at.slots


@given(grounds())
def test_what_could_go_goes_but_for_room_that_is_kept(at: Ground) -> None:
    decision = admit(at.shares, {"default": at.slots})
    if len(decision.picks) == at.slots:
        return
    for share in at.shares:
        for lane in share.lanes:
            if not lane.is_spent:
                place = (share.org_id, lane.lane_id)
                short = [room for room in lane.rooms if not room.has_for(place)]
                assert short, "an item was left though slots and rooms had place for it"
                assert all(room.left < 1 or room.kept_for not in (None, place) for room in short)


@given(grounds())
def test_picks_that_could_not_be_had_give_their_room_back(at: Ground) -> None:
    decision = admit(at.shares, {"default": at.slots})
    pass_over(at.shares, decision.picks, again=True)
    assert {name: room.left for name, room in at.rooms.items()} == at.before
    full = [lane for share in at.shares for lane in share.lanes if lane.full is not None]
    assert not (decision.picks and full), "room came back, so that all may be tried again"


@given(grounds())
def test_a_head_keeps_shared_rooms_only_with_place_in_all_of_its_own(at: Ground) -> None:
    for one in at.waiting:
        place = (one.org_id, one.lane_id)
        own = [room for room in one.rooms if room.org_id == one.org_id]
        shared = [room for room in one.rooms if room.org_id != one.org_id]
        for rooms in (own, shared):
            kept = [room.kept_for == place for room in rooms]
            assert all(kept) or not any(kept), "all or none"
        if any(room.kept_for == place for room in shared):
            assert all(room.kept_for == place and room.left > 0 for room in own)


@given(grounds())
def test_the_longest_wait_keeps_all_of_its_own_rooms(at: Ground) -> None:
    oldest = min(at.waiting, key=lambda one: (one.since_us, one.org_id, one.lane_id), default=None)
    if oldest is not None:
        place = (oldest.org_id, oldest.lane_id)
        assert all(room.kept_for == place for room in oldest.rooms if room.org_id)


@given(grounds(), st.data())
def test_an_org_whose_own_room_is_full_holds_up_nobody_else(
    at: Ground, data: st.DataObject
) -> None:
    """What others' lanes find is the same with its waiting head as without."""
    full = [one for one in at.waiting if any(r.org_id and r.left < 1 for r in one.rooms)]
    if not full:
        return
    one = data.draw(st.sampled_from(full))
    for room in at.rooms.values():
        room.kept_for = None
    keep_rooms([one])
    other = (one.org_id + 1, 0)
    for room in at.rooms.values():
        if room.org_id != one.org_id:
            assert room.has_for(other) == (room.left > 0)


def _run(
    lanes: dict[tuple[int, int], frozenset[str]],
    size: dict[str, int],
    *,
    slots: int,
    costs: dict[int, float],
    until_s: float,
    patience_s: float | None = None,
    weights: dict[int, float] | None = None,
    single: frozenset[tuple[int, int]] = frozenset(),
) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """Serve lanes with endless backlog (`single`: one item); returns service by org and first starts."""
    now, running, nth = 0.0, [], 0
    virtual = dict.fromkeys(costs, 0.0)
    in_use: Counter[str] = Counter()
    service = dict.fromkeys(costs, 0.0)
    first: dict[tuple[int, int], float] = {}
    blocked: dict[tuple[int, int], float] = {}
    while now < until_s:
        rooms = {name: Room(left=size[name] - in_use[name], name=name) for name in size}
        shares = [
            Share(
                queue="default",
                org_id=org,
                weight=(weights or {}).get(org, 1.0),
                virtual_s=virtual[org],
                lanes=[
                    _lane(
                        org,
                        lane,
                        int((org, lane) not in first) if (org, lane) in single else slots,
                        [rooms[name] for name in sorted(needs)],
                        costs[org],
                    )
                    for (of, lane), needs in lanes.items()
                    if of == org
                ],
            )
            for org in costs
        ]
        if patience_s is not None:
            keep_rooms(
                [
                    Waiting(
                        org_id=org,
                        lane_id=lane,
                        since_us=round(since * 1e6),
                        rooms=[rooms[name] for name in sorted(lanes[org, lane])],
                    )
                    for (org, lane), since in blocked.items()
                    if now - since >= patience_s and len(lanes[org, lane]) > 1
                ]
            )
        decision = admit(shares, {"default": slots - len(running)})
        for share in shares:
            virtual[share.org_id] = share.virtual_s
            for lane in share.lanes:
                if lane.taken:
                    blocked.pop((share.org_id, lane.lane_id), None)
                if lane.full is not None:
                    blocked.setdefault((share.org_id, lane.lane_id), now)
        for pick in decision.picks:
            place = (pick.org_id, pick.lane_id)
            first.setdefault(place, now)
            nth += 1
            heapq.heappush(running, (now + costs[pick.org_id], nth, now, place))
            in_use.update(lanes[place])
        assert all(in_use[name] <= size[name] for name in size)
        end, _, _, place = heapq.heappop(running)
        now = end
        service[place[0]] += costs[place[0]]
        in_use.subtract(lanes[place])
        while running and running[0][0] <= now:
            _, _, _, place = heapq.heappop(running)
            service[place[0]] += costs[place[0]]
            in_use.subtract(lanes[place])
    for _, _, began, place in running:
        service[place[0]] += now - began
    return service, first


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 0.9, 1.3, 2.0]), min_size=2, max_size=4),
    st.integers(1, 3),
    st.integers(2, 8),
)
def test_an_item_that_needs_many_keys_is_not_starved(
    costs: list[float], size: int, slots: int
) -> None:
    """Every key is kept busy by orgs that need it alone; the one that needs all goes in bounded time."""
    names = NAMES[: len(costs)]
    lanes = {(nth + 1, 0): frozenset({name}) for nth, name in enumerate(names)}
    many = (len(costs) + 1, 0)
    lanes[many] = frozenset(names)
    by_org = {nth + 1: cost for nth, cost in enumerate(costs)} | {many[0]: 1.0}
    _, first = _run(
        lanes,
        dict.fromkeys(names, size),
        slots=max(slots, size * len(costs) + 1),
        costs=by_org,
        until_s=40.0,
        patience_s=5.0,
        single=frozenset({many}),
    )
    assert many in first
    assert first[many] <= 5.0 + 2 * max(costs) + 0.01


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.5, 2.0]), st.sampled_from([1.0, 2.0, 4.0])),
        min_size=2,
        max_size=5,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_service_under_a_shared_key_differs_within_the_stated_bound(
    orgs: list[tuple[float, float]], size: int, slots: int
) -> None:
    """For S served at once: |Wf/rf - Wm/rm| <= (S + 1) * (lf/rf + lm/rm), whatever the key lets through."""
    costs = {nth + 1: cost for nth, (cost, _) in enumerate(orgs)}
    weights = {nth + 1: weight for nth, (_, weight) in enumerate(orgs)}
    service, _ = _run(
        {(org, 0): frozenset("a") for org in costs},
        {"a": size},
        slots=slots,
        costs=costs,
        weights=weights,
        until_s=20.0,
    )
    at_once = min(size, slots)
    for one in costs:
        for other in costs:
            difference = abs(service[one] / weights[one] - service[other] / weights[other])
            longest = costs[one] / weights[one] + costs[other] / weights[other]
            assert difference <= (at_once + 1) * longest + 1e-6


@settings(max_examples=200)
@given(
    st.integers(1, 500),
    st.sampled_from([0.5, 1.0, 60.0]),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 80)), min_size=1, max_size=40),
)
def test_a_rate_lets_through_rate_times_window_and_burst_and_no_more(
    maximum: int, period_s: float, burst: int, asks: list[tuple[int, int]]
) -> None:
    rule = Rule(
        owner=0, key="provider:x", kind="rate", maximum=maximum, period_s=period_s, burst=burst
    )
    now, tat = 1_000_000_000, None
    went: list[tuple[int, int]] = []
    for pause_us, wanted in asks:
        now += pause_us
        could = limits.allowed(rule, tat, now)
        got = min(could, wanted)
        if got:
            tat = limits.spent(rule, tat, now, got)
            went.append((now, got))
        if tat is not None and got == could:
            # The next one may go exactly from then on, and the meter is no further ahead than it can be.
            assert now <= tat <= now + rule.span_us
            at = limits.next_at_us(rule, tat)
            assert limits.allowed(rule, tat, at) >= 1
            assert limits.allowed(rule, tat, at - 1) == 0
    for nth, (start, _) in enumerate(went):
        count = 0
        for end, got in went[nth:]:
            count += got
            assert count <= (end - start) / rule.interval_us + burst + 1e-9


@given(
    st.integers(1, 100_000),
    st.floats(1e-3, 86_400 * 31),
    st.integers(1, 2**31 - 1),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**52),
)
def test_a_meter_fits_its_column_and_a_raised_rate_does_not_wait_for_it(
    maximum: int, period_s: float, burst: int, tat: int | None, now: int
) -> None:
    rule = Rule(
        owner=0, key="provider:x", kind="rate", maximum=maximum, period_s=period_s, burst=burst
    )
    could = limits.allowed(rule, tat, now)
    after = limits.spent(rule, tat, now, could)
    assert -(2**63) <= after < 2**63
    at = limits.next_at_us(rule, after)
    assert at <= now + rule.span_us
    assert limits.allowed(rule, after, at) >= 1


def test_an_interval_is_never_shorter_than_the_rate_says() -> None:
    rule = Rule(owner=0, key="a:b", kind="rate", maximum=96_000, period_s=1.0, burst=1)
    assert rule.interval_us * 96_000 >= 1_000_000


def _rules(*rules: Rule) -> Rules:
    return Rules.of(rules)


def _rule(key: str, maximum: int, owner: int = 0, of_org: int | None = None) -> Rule:
    return Rule(owner=owner, key=parse_key(key), kind="concurrency", maximum=maximum, of_org=of_org)


def _found(rules: Rules, org_id: int, *keys: str) -> dict[str, int]:
    return {
        place.room.text: place.rule.maximum
        for place in rules.places(org_id, "llm", "answer@3", keys)
    }


def test_the_most_exact_pattern_holds_and_each_owner_counts_for_itself() -> None:
    rules = _rules(
        _rule("org:*", 50),
        _rule("org:acme", 80, of_org=7),
        _rule("provider:*", 20),
        _rule("provider:openai", 30),
        _rule("org:* x provider:openai", 5),
        _rule("provider:openai", 3, owner=7),
        _rule("flow:answer", 9, owner=7),
        _rule("org:me", 11, owner=7),
    )
    assert _found(rules, 7, "provider:openai") == {
        "concurrency 0 7 ": 80,
        "concurrency 0 0 provider:openai": 30,
        "concurrency 0 7 provider:openai": 5,
        "concurrency 7 7 provider:openai": 3,
        "concurrency 7 7 flow:answer": 9,
        "concurrency 7 7 ": 11,
    }
    assert _found(rules, 8, "provider:mistral") == {
        "concurrency 0 8 ": 50,
        "concurrency 0 0 provider:mistral": 20,
    }


def test_pairs_of_two_keys_count_what_holds_both() -> None:
    rules = _rules(_rule("provider:openai × model:*", 4), _rule("queue:llm × provider:openai", 2))
    assert _found(rules, 1, "model:mini", "provider:openai") == {
        "concurrency 0 0 model:mini×provider:openai": 4,
        "concurrency 0 0 provider:openai×queue:llm": 2,
    }
    assert _found(rules, 1, "model:mini") == {}


@given(st.integers(0, 9), st.integers(1, 9), st.sets(st.sampled_from(["a:1", "b:1", "b:2"])))
def test_the_limit_of_a_room_is_found_again_from_its_id(
    owner: int, org_id: int, keys: set[str]
) -> None:
    written = ["a:*", "a:1", "b:*", "a:1 x b:*", "org:*", "org:* x a:1", "org:* x b:*", "flow:*"]
    rules = _rules(*(_rule(key, nth, owner=owner) for nth, key in enumerate(written)))
    for place in rules.places(org_id, "llm", "answer@3", sorted(keys)):
        assert rules.rule_of(RoomId.parse(place.room.text)) == place.rule


@given(st.lists(st.text(max_size=12) | st.sampled_from(["n:a×b×c", "×", "a:1×b:2", "a:1"])))
def test_lanes_of_whatever_keys_have_rooms_and_rooms_of_whatever_name_a_limit_or_none(
    keys: list[str],
) -> None:
    rules = _rules(_rule("a:* x b:*", 1), _rule("a:*", 2), _rule("n:*", 3), _rule("org:* x a:*", 4))
    found = _found(rules, 7, *keys)
    for key in [*keys, *found]:
        rules.rule_of(RoomId.parse(key))
    if "a:1×b:2" in keys:
        assert found["concurrency 0 0 a:1"] == 2, "a pair counts as each of its parts"


def test_a_key_of_a_run_may_be_a_pair_and_nothing_else_with_its_sign() -> None:
    assert check_keys(["b:2 × a:1", "a:1"]) == ("a:1", "b:2")
    for key in ("note:a×b", "a:1×b:2×c:3", "×", "a:1×org:acme"):
        with pytest.raises(InvalidInput) as refused:
            check_keys([key])
        assert refused.value.param == "keys"


def test_limits_are_put_and_dropped_one_by_one() -> None:
    rules = _rules(_rule("a:*", 1), _rule("a:* x b:*", 2), _rule("a:1", 3, owner=7))
    rules.put(_rule("a:*", 5))
    rules.drop(0, "a:*×b:*", "concurrency")
    rules.drop(7, "a:none", "concurrency")
    assert _found(rules, 7, "a:1", "b:1") == {
        "concurrency 0 0 a:1": 5,
        "concurrency 7 7 a:1": 3,
    }
    rules.drop(7, "a:1", "concurrency")
    rules.drop(0, "a:*", "concurrency")
    assert not rules
    assert _found(rules, 7, "a:1", "b:1") == {}


@pytest.mark.parametrize(
    "text", ["", "provider", "provider:", "Provider:x", "a:1×b:1×c:1", "a:x*", "a:1×a:2", "a:\n"]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_key(text)


def test_a_pair_has_one_way_of_writing() -> None:
    assert parse_key("provider:openai x org:acme") == parse_key("org:acme×provider:openai")
    assert parse_key("org:acme × provider:openai") == "org:acme×provider:openai"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["tokens:5"], "tokens:5"),
        (["org:acme"], "org:acme"),
        ([f"model:m{nth}" for nth in range(17)], "17 keys"),
        (["Open AI"], "'Open AI'"),
        (["model:a×b"], "'model:a×b'"),
    ],
)
def test_what_is_no_key_is_refused_by_name_with_what_to_do(keys: list[str], named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_keys(keys)
    assert named in caught.value.message
    assert caught.value.param == "keys"
    assert caught.value.advice
