"""Properties of steps that need keys: rooms of a try, all or none, nobody passed or starved, no limit passed."""

from __future__ import annotations

import heapq
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.test_limits import NAMES, Ground, grounds

from millpond.engine.admission import Lane, Room, Share, Waiting, admit, keep_rooms
from millpond.engine.keying import check_keys
from millpond.engine.needs import concerns, joined, needed, of_step, parted
from millpond.engine.registry import keys_of_step
from millpond.engine.reservations import Reservations
from millpond.engine.rules import KINDS, Rule, Rules
from millpond.engine.seats import Want, seat
from millpond.engine.tokens import rounded

KEYS = [f"{noun}:{name}" for noun in ("model", "provider") for name in ("a", "b")]
PATTERNS = [
    *KEYS,
    "model:*",
    "org:*",
    "queue:default",
    "flow:one",
    "model:a×provider:a",
    "model:*×provider:*",
    "org:*×provider:a",
    "flow:one×model:b",
]


@st.composite
def books(draw: st.DrawFn) -> Rules:
    """Limits of the platform and of an org, of all kinds."""
    rules = []
    for owner in (0, 1):
        for key in draw(st.lists(st.sampled_from(PATTERNS), unique=True, max_size=6)):
            if owner and key.startswith("org:"):
                continue
            kind = draw(st.sampled_from(KINDS))
            is_metered = kind != "concurrency"
            rules.append(
                Rule(
                    owner=owner,
                    key=key,
                    kind=kind,
                    maximum=draw(st.integers(0, 3)),
                    period_s=1.0 if is_metered else None,
                    burst=5000 if kind == "tokens" else 1 if is_metered else None,
                )
            )
    return Rules.of(rules)


some_keys = st.lists(st.sampled_from(KEYS), unique=True, max_size=3)


@given(books(), some_keys, some_keys)
def test_run_and_try_together_have_the_rooms_of_both_and_none_twice(
    rules: Rules, run_keys: Sequence[str], keys: Sequence[str]
) -> None:
    whole = {one.room for one in rules.places(1, "default", "one@1", joined(run_keys, keys))}
    held = {one.room for one in rules.places(1, "default", "one@1", run_keys)}
    mine = needed(rules, 1, "default", "one@1", run_keys, keys)
    if not keys:
        assert not mine
        return
    assert whole == held | {one.room for one in mine}
    twice = [one for one in mine if one.room in held]
    assert all(one.rule.kind == "rate" for one in twice), "a place is not taken twice"
    rest = [key for key in run_keys if key not in keys]
    others = {one.room for one in rules.places(1, "default", "one@1", rest)}
    assert not others & {one.room for one in mine}, "what the step has no part in"


@given(books(), some_keys, some_keys)
def test_who_may_need_room_is_told_that_limits_concern_it(
    rules: Rules, run_keys: Sequence[str], keys: Sequence[str]
) -> None:
    if needed(rules, 1, "default", "one@1", run_keys, keys):
        assert concerns(rules, 1, tuple(keys))
    if not any(one.split(":")[0] in ("model", "provider") for one in keys):
        assert not concerns(rules, 1, tuple(keys))


@given(some_keys, some_keys)
def test_keys_of_run_and_step_are_told_apart(run_keys: Sequence[str], keys: Sequence[str]) -> None:
    assert [list(one) for one in parted(joined(run_keys, keys))] == [run_keys, keys]
    assert parted(run_keys) == (run_keys, ())


@given(
    books(),
    some_keys,
    some_keys,
    st.none() | st.integers(1, 5000),
    st.none() | st.integers(1, 5000),
)
def test_each_limit_on_tokens_is_reserved_by_a_run_or_by_its_step_in_line_and_never_by_both(
    rules: Rules,
    run_keys: Sequence[str],
    keys: Sequence[str],
    run_need: int | None,
    need: int | None,
) -> None:
    run_keys = check_keys(run_keys, tokens=run_need)
    step_keys = keys_of_step("ask", keys, need if keys else None)
    row = {
        "org_id": 1,
        "lane_id": 7,
        "queue": "default",
        "capability": "one@1",
        "keys": joined(run_keys, step_keys) if step_keys else run_keys,
    }
    lane = rules.places(1, "default", "one@1", row["keys"])
    mine = of_step(rules, 1, "default", "one@1", row["keys"])
    own = {one.room for one in rules.places(1, "default", "one@1", run_keys)}
    weighed = {one.room for one in lane if one.rule.is_of_tokens}
    assert own & weighed | {one.room for one in mine} == weighed
    assert own.isdisjoint(one.room for one in mine)
    known = Reservations()
    made = known.need(row, lane, mine)  # type: ignore[arg-type]
    needs = known.needs(row) or {}  # type: ignore[arg-type]
    assert set(needs) == {one.room.text for one in mine}
    for room in weighed:
        takes = needs.get(room.text, made)
        asked = need if room.text in needs else run_need
        assert takes == (1000 if asked is None else rounded(asked))
        found = known.need_in((1, 7), room.text)
        assert found is not None
        assert found.tokens == takes
    # What the step takes in line it would take beside its run, too.
    places = needed(rules, 1, "default", "one@1", run_keys, step_keys)
    beside = known.of_try("one@1", run_keys, step_keys, places)
    assert [one.room for one in places if one.rule.is_of_tokens] == [one.room for one in mine]
    assert ({} if beside is None else {one.room.text: beside.need.tokens for one in mine}) == needs


@st.composite
def asked(draw: st.DrawFn) -> tuple[Ground, list[Want], dict[str, int]]:
    """Rooms and lanes of one claim, steps that ask, and how many lanes of others stand under rooms."""
    ground = draw(grounds())
    names = st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3)
    wants = [
        Want(rooms=[ground.rooms[name] for name in sorted(one)])
        for one in draw(st.lists(names, max_size=8))
    ]
    ahead = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)))
    return ground, wants, ahead


@given(asked())
def test_tries_take_all_their_rooms_or_none_and_never_more_than_is_left(
    at: tuple[Ground, list[Want], dict[str, int]],
) -> None:
    ground, wants, ahead = at
    admit(ground.shares, {"default": ground.slots})
    before = {name: room.left for name, room in ground.rooms.items()}
    seat(wants, ahead)
    went = Counter(room.name for one in wants if one.full is None for room in one.rooms)
    for name, room in ground.rooms.items():
        assert room.left == before[name] - went[name]
        assert went[name] <= max(0, before[name] - ahead.get(name, 0))
        if room.kept_for is not None and went[name]:
            assert room.left > ahead.get(name, 0), "what is kept stays"


@given(asked())
def test_no_try_takes_what_a_head_in_line_could_have_taken(
    at: tuple[Ground, list[Want], dict[str, int]],
) -> None:
    """With a slot left, every head that stays behind wants for a room without what tries take, too."""
    ground, wants, ahead = at
    decision = admit(ground.shares, {"default": ground.slots})
    behind = [
        ((share.org_id, lane.lane_id), lane)
        for share in ground.shares
        for lane in share.lanes
        if not lane.is_spent
    ]
    could_go = [place for place, lane in behind if all(room.has_for(place) for room in lane.rooms)]
    assert not could_go or len(decision.picks) == ground.slots
    left = {name: room.left for name, room in ground.rooms.items()}
    seat(wants, ahead)
    for name, lanes in ahead.items():
        assert ground.rooms[name].left >= min(left[name], lanes), "theirs to take now"


@given(asked())
def test_what_has_room_begins_and_an_earlier_one_goes_first(
    at: tuple[Ground, list[Want], dict[str, int]],
) -> None:
    ground, wants, ahead = at
    admit(ground.shares, {"default": ground.slots})
    seat(wants, ahead)
    for one in wants:
        if one.full is not None:
            room = one.full
            kept = room.kept_for is not None
            assert room.left - kept - ahead.get(room.name, 0) <= 0
    for nth, one in enumerate(wants):
        for later in wants[nth + 1 :]:
            if {room.name for room in later.rooms} >= {room.name for room in one.rooms}:
                assert one.full is None or later.full is not None, (
                    "passed by one that needs the same"
                )


# Over time: runs whose steps need keys, in slots, beside runs that have the keys themselves.


@dataclass
class Run:
    """A run: its org, the rooms it has, and the rooms of each of its steps to come."""

    nth: int
    org: int
    rooms: frozenset[str]
    steps: deque[frozenset[str]]
    since: float = 0.0
    step: frozenset[str] | None = None


@dataclass
class Pool:
    """Slots, rooms and lines, with claims at every end of a step."""

    size: dict[str, int]
    slots: int
    patience_s: float
    now: float = 0.0
    in_use: Counter[str] = field(default_factory=Counter)
    lines: dict[tuple[int, frozenset[str]], deque[Run]] = field(default_factory=dict)
    blocked: dict[tuple[int, frozenset[str]], float] = field(default_factory=dict)
    virtual: dict[int, float] = field(default_factory=dict)
    busy: list[tuple[float, int, Run]] = field(default_factory=list)
    asking: list[Run] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    done: int = 0
    free: int = 0

    def take(self, names: frozenset[str]) -> None:
        self.in_use.update(names)
        assert all(self.in_use[name] <= self.size[name] for name in names), "above a limit"

    def line(self, run: Run, names: frozenset[str]) -> None:
        run.since = self.now
        self.lines.setdefault((run.org, names), deque()).append(run)

    def begin(self, run: Run, took_s: float) -> None:
        heapq.heappush(self.busy, (self.now + took_s, run.nth, run))

    def claim(self, took_s: float) -> None:
        """Admit what stands in line, then let tries begin whose runs have slots; the others park."""
        rooms = {
            name: Room(left=self.size[name] - self.in_use[name], name=name) for name in self.size
        }
        places = {key: nth for nth, key in enumerate(self.lines)}
        shares: dict[int, Share] = {}
        for (org, names), runs in self.lines.items():
            if not runs:
                continue
            share = shares.setdefault(
                org,
                Share(
                    queue="default", org_id=org, weight=1.0, virtual_s=self.virtual.get(org, 0.0)
                ),
            )
            share.lanes.append(
                Lane(
                    lane_id=places[org, names],
                    offset_us=0,
                    ranks=[round(one.since * 1e6) + one.nth for one in runs],
                    items=[uuid.UUID(int=one.nth) for one in runs],
                    is_whole=True,
                    estimate_s=took_s,
                    rooms=[rooms[name] for name in sorted(names)],
                )
            )
        keep_rooms(
            [
                Waiting(
                    org_id=org,
                    lane_id=places[org, names],
                    since_us=round(since * 1e6),
                    rooms=[rooms[name] for name in sorted(names)],
                )
                for (org, names), since in self.blocked.items()
                if self.lines[org, names] and self.now - since >= self.patience_s and len(names) > 1
            ]
        )
        admit(list(shares.values()), {"default": self.free})
        keys = list(self.lines)
        for share in shares.values():
            self.virtual[share.org_id] = share.virtual_s
            for lane in share.lanes:
                org, names = keys[lane.lane_id]
                if lane.taken:
                    self.blocked.pop((org, names), None)
                if lane.full is not None:
                    self.blocked.setdefault((org, names), self.now)
                for _ in range(lane.taken):
                    run = self.lines[org, names].popleft()
                    self.waited.append(self.now - run.since)
                    self.take(names)
                    self.free -= 1
                    self.begin(run, took_s)
        wants = [
            Want(rooms=[rooms[name] for name in sorted(run.step or ())]) for run in self.asking
        ]
        seat(wants, {})
        for run, want in zip(self.asking, wants, strict=True):
            if want.full is None:
                self.take(run.step or frozenset())
                self.begin(run, took_s)
            else:  # its branch parks: the slot goes back, and it stands in line for all its keys
                self.in_use.subtract(run.rooms)
                self.free += 1
                self.line(run, run.rooms | (run.step or frozenset()))
        self.asking.clear()

    def end_next(self) -> None:
        """Let the next step be over: its run asks for the one after it, or ends."""
        self.now, _, run = heapq.heappop(self.busy)
        if run.step is not None:
            self.in_use.subtract(run.step)
        if run.steps:
            run.step = run.steps.popleft() - run.rooms
            self.asking.append(run)
            return
        self.in_use.subtract(run.rooms)
        self.free += 1
        self.done += 1


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(4, 40))
def test_over_time_no_limit_is_passed_and_everybody_gets_done(
    data: st.DataObject, slots: int, size: int, count: int
) -> None:
    names = st.frozensets(st.sampled_from(NAMES), max_size=2)
    pool = Pool(size=dict.fromkeys(NAMES, size), slots=slots, patience_s=5.0, free=slots)
    for nth in range(count):
        steps = data.draw(
            st.lists(st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3), max_size=3)
        )
        run = Run(nth, 1 + nth % 3, data.draw(names), deque(steps))
        pool.line(run, run.rooms)
    for _ in range(20 * count):
        pool.claim(1.0)
        if not pool.busy:
            pool.claim(1.0)  # for those that have just parked
        if not pool.busy:
            break
        pool.end_next()
    assert pool.done == count, "some never went"
    assert not +pool.in_use
    assert pool.free == slots


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 2))
def test_a_parked_step_with_many_keys_is_not_starved_by_asks_and_lanes(
    many: int, size: int
) -> None:
    """Each key is kept busy by runs that have it, and by steps that ask for it; one step needs all of them."""
    names = NAMES[:many]
    pool = Pool(size=dict.fromkeys(names, size), slots=64, patience_s=2.0, free=64)
    nth = 0
    for name in names:
        for _ in range(60):
            nth += 1
            run = Run(nth, 1 + NAMES.index(name), frozenset({name}), deque())
            pool.line(run, run.rooms)
            nth += 1
            asks = Run(nth, 1 + NAMES.index(name), frozenset(), deque([frozenset({name})] * 3))
            pool.line(asks, asks.rooms)
    one = Run(10_000, 9, frozenset(), deque([frozenset(names)]))
    pool.line(one, one.rooms)
    while one.steps or one.step is None or any(one in runs for runs in pool.lines.values()):
        pool.claim(1.0)
        if not pool.busy:
            pool.claim(1.0)
        assert pool.busy, "all stand still"
        pool.end_next()
        assert pool.now < 2.0 + 6.0 * many + 20.0, "starved"
