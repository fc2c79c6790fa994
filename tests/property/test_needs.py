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

from millpond.engine.admission import Decision, Lane, Room, Share, admit
from millpond.engine.keeping import Waiting, keep_rooms
from millpond.engine.keying import check_keys
from millpond.engine.needs import concerns, joined, needed, of_step, parted
from millpond.engine.registry import keys_of_step
from millpond.engine.reservations import Reservations
from millpond.engine.rules import KINDS, Rule, Rules
from millpond.engine.seats import Elder, Line, Want
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


@dataclass
class Asked:
    """What tries want of a claim beside its lanes, and what stands elsewhere under the rooms."""

    ground: Ground
    wants: list[Want]
    elders: list[Elder]


@st.composite
def asked(draw: st.DrawFn, *, only_org: bool = False) -> Asked:
    """Rooms and lanes of one claim, steps that ask or wait, here and elsewhere, and lanes that others could let go."""
    ground = draw(grounds())
    if only_org:
        del ground.shares[1:]
    ranks = iter(draw(st.permutations(range(200))))
    for share in ground.shares:
        share.virtual_s = draw(st.sampled_from([0.0, 1.5, 3.0]))
        for lane in share.lanes:
            lane.ranks = sorted(next(ranks) for _ in lane.items)
    names = st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3)
    wants = []
    for one in draw(st.lists(names, max_size=8)):
        is_here = draw(st.booleans())
        wants.append(
            Want(
                rooms=[ground.rooms[name] for name in sorted(one)],
                org_id=1 if only_org else draw(st.integers(1, 5)),
                queue=draw(st.sampled_from(["default", "other"])),
                since_us=None if is_here and draw(st.booleans()) else next(ranks),
                virtual_s=draw(st.sampled_from([0.0, 1.5, 3.0])),
                is_here=is_here,
            )
        )
    elders = [
        Elder(
            room=draw(st.sampled_from(NAMES)),
            org_id=draw(st.integers(1, 5)),
            lane_id=90 + nth,
            queue="elsewhere",
            offset_us=0,
            virtual_s=0.0,
            slots=draw(st.integers(0, 2)),
            ranks=sorted(next(ranks) for _ in range(draw(st.integers(0, 2)))),
        )
        for nth in range(0 if only_org else draw(st.integers(0, 3)))
    ]
    return Asked(ground, wants, elders)


def claim_with(at: Asked) -> Decision:
    """Decide a claim as `claim` does."""
    free = {"default": at.ground.slots}
    line = Line(at.wants, at.elders, at.ground.shares, free)
    line.begin()
    decision = admit(at.ground.shares, free)
    line.finish()
    return decision


@given(asked())
def test_tries_take_all_their_rooms_or_none_and_never_more_than_is_left(at: Asked) -> None:
    decision = claim_with(at)
    assert len(decision.picks) <= at.ground.slots, "a try needs no slot"
    went = at.ground.picked()
    for want in at.wants:
        assert want.has_gone == (want.full is None)
        if want.has_gone:
            went.update(room.name for room in want.rooms)
    for name, room in at.ground.rooms.items():
        assert room.left == at.ground.before[name] - went[name]
        assert went[name] <= max(0, at.ground.before[name])
        assert room.went + room.spared == went[name]
        if room.kept_for is not None and went[name] > at.ground.picked()[name]:
            assert room.left >= room.kept, "what is kept stays"


@given(asked())
def test_what_is_only_left_for_steps_of_other_workers_is_not_spent(at: Asked) -> None:
    claim_with(at)
    for name, room in at.ground.rooms.items():
        others = [one for one in at.wants if one.has_gone and not one.is_here]
        assert room.spared == sum(room in one.rooms for one in others), name


@given(asked())
def test_no_try_passes_an_earlier_head_that_could_have_gone(at: Asked) -> None:
    """With a slot left, a head that stays behind lacks room also without what tries take that came after it."""
    decision = claim_with(at)
    if len(decision.picks) == at.ground.slots:
        return
    for share in at.ground.shares:
        for lane in share.lanes:
            if lane.is_spent:
                continue
            rank, place = lane.ranks[lane.taken], (share.org_id, lane.lane_id)
            later = [one for one in at.wants if one.has_gone and (one.since_us or rank + 1) > rank]
            for room in lane.rooms:
                room.left += sum(any(own is room for own in one.rooms) for one in later)
            could = all(room.has_for(place) for room in lane.rooms)
            for room in lane.rooms:
                room.left -= sum(any(own is room for own in one.rooms) for one in later)
            assert not could, "passed"


@given(asked())
def test_no_try_takes_what_work_elsewhere_that_stands_before_it_could_take_now(at: Asked) -> None:
    claim_with(at)
    for want in at.wants:
        for room in want.rooms if want.has_gone else ():
            before = [
                one
                for one in at.elders
                if one.room == room.name
                for rank in one.ranks
                if want.since_us is None or rank < want.since_us
            ]
            slots = max((one.slots for one in at.elders if one.room == room.name), default=0)
            after = [
                one
                for one in at.wants
                if one.has_gone and room in one.rooms and _is_later(one, want)
            ]
            picked = at.ground.picked()[room.name]
            # As it went there was so much left; of that later tries and items may have taken some.
            assert room.left + len(after) + picked >= min(len(before), slots)


def _is_later(one: Want, other: Want) -> bool:
    return (one.since_us is None, one.since_us or 0) > (other.since_us is None, other.since_us or 0)


@given(asked(only_org=True))
def test_work_and_tries_of_one_org_go_in_the_order_in_which_they_came(at: Asked) -> None:
    """As if they stood in one line: whoever has its turn takes all it needs, or is passed for want of room alone."""
    ground = at.ground
    left = {name: room.left for name, room in ground.rooms.items()}
    kept = {name: room.kept_for for name, room in ground.rooms.items() if room.kept_for is not None}
    (share,) = ground.shares
    line: list[tuple[float, int, object]] = [
        (rank, nth, lane) for nth, lane in enumerate(share.lanes) for rank in lane.ranks
    ]
    fresh = 1000.0
    for nth, want in enumerate(at.wants):
        line.append((fresh + nth if want.since_us is None else want.since_us, nth, want))
    taken: Counter[int] = Counter()
    begun: list[Want] = []
    stuck: set[int] = set()
    slots = ground.slots
    for _, nth, one in sorted(line, key=lambda at: at[0]):
        if isinstance(one, Want):
            if all(left[room.name] - (room.name in kept) > 0 for room in one.rooms):
                begun.append(one)
                for room in one.rooms:
                    left[room.name] -= 1
            continue
        assert isinstance(one, Lane)
        place = (share.org_id, one.lane_id)
        if nth in stuck or slots == 0:
            continue
        if all(left[r.name] - (kept.get(r.name, place) != place) > 0 for r in one.rooms):
            taken[nth] += 1
            slots -= 1
            for room in one.rooms:
                left[room.name] -= 1
                if kept.get(room.name) == place:
                    del kept[room.name]
        else:
            stuck.add(nth)
    claim_with(at)
    assert [lane.taken for lane in share.lanes] == [taken[nth] for nth in range(len(share.lanes))]
    assert [one for one in at.wants if one.has_gone] == [one for one in at.wants if one in begun]


class Watching(Line):
    """Notes at each item that goes which tries stand before it that do not go first, and why."""

    def __init__(self, at: Asked) -> None:
        super().__init__(at.wants, at.elders, at.ground.shares, {"default": at.ground.slots})
        self.at = at

    def let_before(self, share: Share, lane: Lane) -> None:
        super().let_before(share, lane)
        rank = lane.ranks[lane.taken]
        for want in self.at.wants:
            if want.has_gone or want.since_us is None or not _precedes(self.at, want, share, rank):
                continue
            lacks = any(
                room.left - (room.kept_for is not None) < 1
                or room.left <= sum(one.slots for one in self.at.elders if one.room == room.name)
                for room in want.rooms
            )
            older = any(
                not other.is_spent
                and other.full is None
                and not _precedes(self.at, want, of, other.ranks[other.taken])
                and any(own is room for own in want.rooms for room in other.rooms)
                for of in self.at.ground.shares
                for other in of.lanes
            )
            assert lacks or older, "work that came later passes a try that could begin"


def _precedes(at: Asked, want: Want, share: Share, rank: int) -> bool:
    """Whether a try stands before an item: of its org by time, of others unless these have had less of the queue."""
    if want.since_us is None or want.since_us > rank:
        return False
    if want.org_id == share.org_id or want.queue != share.queue:
        return True
    own = [one.virtual_s for one in at.ground.shares if one.org_id == want.org_id]
    return (own[0] if own else want.virtual_s) <= share.virtual_s


@given(asked())
def test_no_later_work_passes_a_waiting_try_that_could_begin(at: Asked) -> None:
    """Whether its run is in this worker or in another."""
    line = Watching(at)
    line.begin()
    admit(at.ground.shares, {"default": at.ground.slots})
    line.finish()


# Over time: runs whose steps need keys, in slots, beside runs that have the keys themselves.


@dataclass
class Run:
    """A run: its org, the rooms it has, and the rooms of each of its steps to come.

    Its steps wait `is_beside` working branches, or else park; `asked` is since when the next one waits there.
    """

    nth: int
    org: int
    rooms: frozenset[str]
    steps: deque[frozenset[str]]
    since: float = 0.0
    step: frozenset[str] | None = None
    is_beside: bool = False
    asked: float | None = None


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
        old = [
            Waiting(
                org_id=run.org,
                lane_id=-1 - run.nth,
                since_us=round(run.asked * 1e6),
                rooms=[rooms[name] for name in sorted(run.step or ())],
            )
            for run in self.asking
            if run.asked is not None and self.now - run.asked >= self.patience_s
        ]
        keep_rooms(
            old
            + [
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
        wants = [
            Want(
                rooms=[rooms[name] for name in sorted(run.step or ())],
                org_id=run.org,
                queue="default",
                since_us=None if run.asked is None else round(run.asked * 1e6) + run.nth,
                virtual_s=self.virtual.get(run.org, 0.0),
                place=(run.org, -1 - run.nth),
            )
            for run in self.asking
        ]
        line = Line(wants, (), list(shares.values()), {"default": self.free})
        line.begin()
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
        line.finish()
        still = []
        for run, want in zip(self.asking, wants, strict=True):
            if want.has_gone:
                self.take(run.step or frozenset())
                self.begin(run, took_s)
                run.asked = None
            elif run.is_beside:
                still.append(run)
                run.asked = self.now if run.asked is None else run.asked
            else:  # its branch parks: the slot goes back, and it stands in line for all its keys
                self.in_use.subtract(run.rooms)
                self.free += 1
                self.line(run, run.rooms | (run.step or frozenset()))
        self.asking = still

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
        run = Run(
            nth, 1 + nth % 3, data.draw(names), deque(steps), is_beside=data.draw(st.booleans())
        )
        pool.line(run, run.rooms)
    for _ in range(20 * count):
        pool.claim(1.0)
        if not pool.busy:
            for run in pool.asking:  # what worked beside them ends some time
                run.is_beside = False
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
@given(st.integers(2, 4), st.integers(1, 2), st.booleans())
def test_a_step_with_many_keys_is_not_starved_by_asks_and_lanes(
    many: int, size: int, is_beside: bool
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
    one = Run(10_000, 9, frozenset(), deque([frozenset(names)]), is_beside=is_beside)
    pool.line(one, one.rooms)
    while True:
        pool.claim(1.0)
        if not pool.busy:
            pool.claim(1.0)
        if any(run is one and run.step is not None for _, _, run in pool.busy):
            break
        assert pool.busy, "all stand still"
        pool.end_next()
        assert pool.now < 2.0 + 6.0 * many + 20.0, "starved"
