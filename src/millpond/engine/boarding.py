"""Boarding: what a claim reads and writes of steps that need room beside their runs.

Called by `claim`, within its transaction. Invariants: a step gets room in a claim of its worker alone, in all its rooms
at once, and its row is on disk before it begins; one that has just come takes what is left after the work in line, and
not what others could take of it now, but for rooms where orgs take turns; one that waits stands in line in the sight of
every claim, which leaves its places to it (`seats`); a picked step of a waiting run readies that run, which the same
claim takes.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.admission import Pick, Room, Share
from millpond.engine.charges import Toll
from millpond.engine.crossings import Crossings
from millpond.engine.lanes import ALONE, KEY_SEPARATOR, PRIORITY_STEP_US, RESUME_LEAD_US
from millpond.engine.limiting import Limiter
from millpond.engine.needs import APART, Answer, Ask, name_of, needed
from millpond.engine.reservations import Needing, Taken
from millpond.engine.rules import Place
from millpond.engine.seats import Elder, Line, Want, give_back
from millpond.engine.tokens import above_limit
from millpond.engine.waiters import Asked, drop_ghosts, elders, holders, who_is
from millpond.errors import InvalidInput
from millpond.types import NO_ORG

_SQL = queries("needs")
_CROSSINGS = queries("crossings")
# What a rate let go begins so soon after, or is admitted anew: so that its call is at the other end within 250 ms.
LATE_S = 0.15

_Id = tuple[int, uuid.UUID]  # org, and run or step in line


class _Seat(NamedTuple):
    """Room for one try under a lease; `keys` is one text."""

    org_id: int
    item_id: uuid.UUID
    token: uuid.UUID
    step_key: str
    keys: str


class Called(NamedTuple):
    """A step for whose sake a waiting run was taken, with its place in line until then; `keys` is one text."""

    step_key: str
    keys: str
    since_us: int


class _Trying(NamedTuple):
    """A step that asks, the places that its try needs, and what that takes of limits on tokens."""

    ask: Ask
    places: tuple[Place, ...]
    needing: Needing | None

    def refusal(self) -> InvalidInput | None:
        """Return why there is never room for it; None where there is sometimes."""
        if self.needing is None or not self.needing.need.is_declared:
            return None
        need = self.needing.need.tokens
        rules = [place.rule for place in self.places if place.rule.is_of_tokens]
        small = next((rule for rule in rules if rule.at_once < need), None)
        if small is None:
            return None
        return above_limit(f"step {name_of(self.ask.step_key)}", need, small.key, small.at_once)

    def taken(self) -> list[Taken]:
        """Return what it takes of limits on tokens."""
        if self.needing is None:
            return []
        need, *names = self.needing
        of = self.ask.org_id, self.ask.item_id, self.ask.step_key
        rooms = [place.room.text for place in self.places if place.rule.is_of_tokens]
        return [Taken(*of, room, need.tokens, *names) for room in rooms]


class Boarding:
    """The asks of one claim and their `answers`; `summons` are workers that have steps for which room was left.

    `called` are the steps for whose sake it took runs, by run; `run_of` and `step_of` name the run and the step by the
    step's id in line.
    """

    def __init__(self, limits: Limiter, worker_id: uuid.UUID) -> None:
        self._limits = limits
        self._worker_id = worker_id
        # Of tries that began in a claim whose answer may have been lost: those that ride again have these.
        self._charged: dict[Ask, Toll | None] = {}
        self.begin(())

    def begin(self, asks: Sequence[Ask]) -> None:
        """Make ready for a claim."""
        self.asks = asks
        self.answers: dict[Ask, Answer] = {}
        self.summons: set[uuid.UUID] = set()
        self.called: dict[_Id, list[Called]] = {}
        self.run_of: dict[_Id, _Id] = {}
        self.step_of: dict[_Id, str] = {}
        self._lines: set[tuple[int, int]] = set()
        self._together: Counter[tuple[int, int]] = Counter()
        self._line: Line | None = None
        self._wanted: dict[Ask, Want] = {}
        self._tries: dict[Ask, _Trying] = {}
        self._seen: set[Ask] = set()
        self._elsewhere: list[tuple[Want, Asked]] = []
        if asks:
            self._charged = {ask: self._charged[ask] for ask in asks if ask in self._charged}

    # Steps of runs under leases

    async def look(
        self, con: Connection, free: Mapping[str, int], shares: Sequence[Share] = ()
    ) -> None:
        """See which steps want room in this claim, before its slots are given out: nothing passes those that wait."""
        if self.asks:
            await self._read(con)
        mine = {who_is(ask.item_id, ask.step_key) for ask in self.asks}
        self._elsewhere = [
            (one.want, one) for one in self._limits.asked if one.rooms and one.who not in mine
        ]
        wants = [*self._wanted.values(), *(want for want, _ in self._elsewhere)]
        if not wants:
            return
        queues = [queue for queue, slots in free.items() if slots > 0]
        old: Sequence[Elder] = ()
        if self._limits.has_rooms:
            old = await elders(con, wants, self._worker_id, queues, self._limits.use_s)
        if self._limits.crossings.known:
            await self._cross(con, wants, old)
        self._line = Line(wants, old, shares, free)
        self._line.begin()

    async def let_on(self, con: Connection) -> None:
        """Let the others begin with what is left, once slots are given out, and answer all that asked.

        What this spends of rates is to be stored after it.
        """
        if self._line is None:
            return
        self._line.finish()
        await self._meet(con)
        waits = [one for want, one in self._elsewhere if want.has_gone]
        self.summons = await holders(con, waits)
        if self._worker_id in self.summons:
            # Of its own steps those wait that ride in this claim: nobody is left who waits for these.
            await drop_ghosts(con, waits, self._worker_id)
            self.summons.discard(self._worker_id)
        if self._wanted:
            self.answers |= await self._answer(con)

    async def _cross(self, con: Connection, wants: Sequence[Want], old: Sequence[Elder]) -> None:
        """See which steps want room that several queues need, and where the orgs stand that do."""
        crossings = self._limits.crossings
        crossed: dict[str, Room] = {}
        riding: dict[str, set[int]] = defaultdict(set)
        for want in wants:
            for room in want.rooms:
                if room.name in crossings.known:
                    crossed[room.name] = room
                    if want.since_us is not None:
                        riding[room.name].add(want.org_id)
        if not crossed:
            return
        orgs = {want.org_id for want in wants} | {one.org_id for one in old}
        await crossings.read(con, crossed.values(), orgs, riding)
        lines = {(one.org_id, one.queue) for one in wants}
        columns = [[one[nth] for one in lines] for nth in range(2)]
        rows = await con.fetch(_CROSSINGS["weights"], *columns)
        weights = {(row["org_id"], row["queue"]): row["weight"] for row in rows}
        for want in wants:
            if through := crossings.through(want.rooms):
                want.crossings = through
                if want.since_us is None:  # it goes by what its org has used, as who waits does
                    want.since_us = self._limits.now_us
                weight = weights.get((want.org_id, want.queue), 1.0)
                want.use_s = crossings.try_s(want.able) / weight

    async def _meet(self, con: Connection) -> None:
        """Let rooms be crossings where steps wait beside working branches, and work of another queue too."""
        known = self._limits.crossings.known
        wants = [*self._wanted.values(), *(want for want, _ in self._elsewhere)]
        stands = {
            (want.full.name, want.queue)
            for want in wants
            if want.full is not None and want.full.org_id == NO_ORG and not want.full.is_weighed
        }
        if stands := {one for one in stands if one[0] not in known}:
            await self._limits.crossings.meet(con, stands)

    async def _read(self, con: Connection) -> None:
        """Read where the steps of this worker stand; those that no limit concerns have room."""
        limits, asks = self._limits, self.asks
        rows = await con.fetch(
            _SQL["riders"],
            [one.org_id for one in asks],
            [one.item_id for one in asks],
            [one.token for one in asks],
            [one.step_key for one in asks],
        )
        # One whose lease is gone is not among the rows: its attempt will hear of that.
        self.answers = {ask: Answer(is_seated=False, since_us=ask.since_us) for ask in asks}
        wanted: list[tuple[Record, _Trying]] = []
        for row in rows:
            ask = asks[row["ord"] - 1]
            able = row["capability"].rstrip(ALONE)
            places = needed(limits.rules, ask.org_id, row["queue"], able, row["keys"], ask.keys)
            if row["has_room"]:  # of a claim whose answer was lost
                toll = self._charged.get(ask)
                # What a rate let go then is too late by now, and asks anew.
                begin_by = 0.0 if any(at.rule.kind == "rate" for at in places) else None
                self.answers[ask] = Answer(
                    is_seated=True, has_row=True, begin_by=begin_by, toll=toll
                )
                continue
            needing = limits.reservations.of_try(able, row["keys"], ask.keys, places)
            trying = _Trying(ask, places, needing)
            if refusal := trying.refusal():
                seen = row["is_seen"]
                self.answers[ask] = Answer(is_seated=False, has_row=seen, refusal=refusal)
            elif places or row["is_seen"]:  # who stands in line leaves it
                wanted.append((row, trying))
            else:
                self.answers[ask] = Answer(is_seated=True)
        await limits.meter(con, [place for _, one in wanted for place in one.places])
        known = {one.who: one.place for one in limits.asked}
        for row, one in wanted:
            ask = one.ask
            self._tries[ask] = one
            if row["is_seen"]:
                self._seen.add(ask)
            place = known.get(who_is(ask.item_id, ask.step_key))
            self._wanted[ask] = _want(one, row, [limits.room(at) for at in one.places], place)

    async def _answer(self, con: Connection) -> dict[Ask, Answer]:
        """Write what became of the steps of this worker: room for those that begin, and who stands in line."""
        limits = self._limits
        answers: dict[Ask, Answer] = {}
        gone = [ask for ask, want in self._wanted.items() if want.has_gone]
        seated = await _seat(con, [_seat_of(ask) for ask in gone])
        begin = {ask for nth, ask in enumerate(gone, 1) if nth in seated}
        unseen: list[tuple[Ask, int]] = []
        for ask, want in self._wanted.items():
            if ask in begin:
                is_paced = any(place.rule.kind == "rate" for place in self._tries[ask].places)
                begin_by = limits.began + LATE_S if is_paced else None
                through = [one.room.name for one in want.crossings]
                toll = _toll(limits.crossings, want.queue, want.able, through)
                self._charged[ask] = toll
                answers[ask] = Answer(is_seated=True, has_row=True, begin_by=begin_by, toll=toll)
                continue
            if want.is_beyond:  # its worker takes it out of its line until it has a place there
                answers[ask] = Answer(
                    is_seated=False,
                    has_row=ask in self._seen,
                    since_us=want.since_us,
                    is_beyond=True,
                )
                continue
            if want.full is not None:
                needing = self._tries[ask].needing
                limits.put_off(want.full, None if needing is None else needing.need)
            else:  # its lease is just being given back
                give_back(want)
            since_us = limits.now_us if want.since_us is None else want.since_us
            is_seen = ask in self._seen
            if not is_seen and (ask.is_beside or ask.since_us is not None):
                unseen.append((ask, since_us))
                is_seen = True
            answers[ask] = Answer(is_seated=False, has_row=is_seen, since_us=since_us)
        taken = [one for ask in begin for one in self._tries[ask].taken()]
        await limits.reservations.reserve(con, taken)
        if unseen:
            rows = [_seat_of(ask) for ask, _ in unseen]
            columns = [[one[nth] for one in rows] for nth in range(5)]
            await con.execute(_SQL["ask"], *columns, [since_us for _, since_us in unseen])
        return answers

    # Steps of waiting runs

    def note(self, rows: Sequence[Record]) -> None:
        """Note which of the lanes that were read are lines of steps."""
        self._lines = {(row["org_id"], row["lane_id"]) for row in rows if APART in row["keys"]}

    async def call(self, con: Connection, picks: Sequence[Pick]) -> Sequence[Pick]:
        """Ready the runs of picked steps; returns what is to be taken: these runs in place of their steps.

        What is not returned stands no more in line, or somebody holds it.
        """
        steps = [one for one in picks if (one.org_id, one.lane_id) in self._lines]
        if not steps:
            return picks
        rows = await con.fetch(
            _SQL["call"],
            [one.org_id for one in steps],
            [one.lane_id for one in steps],
            [one.rank for one in steps],
            [one.item_id for one in steps],
            PRIORITY_STEP_US,
            RESUME_LEAD_US,
            ALONE,
        )
        helpers = {(one.org_id, one.item_id): one.helper for one in steps}
        runs: dict[tuple[int, uuid.UUID], Pick] = {}
        for row in rows:
            run, need = (row["org_id"], row["run_id"]), (row["org_id"], row["need_id"])
            if run in runs:
                self._together[run[0], steps[row["ord"] - 1].lane_id] += 1
            runs.setdefault(run, Pick(run[0], row["lane_id"], row["rank"], run[1], helpers[need]))
            step = Called(row["step_key"], row["keys"], row["since_us"])
            self.called.setdefault(run, []).append(step)
            self.run_of[need], self.step_of[need] = run, row["step_key"]
        whole = [one for one in picks if (one.org_id, one.lane_id) not in self._lines]
        return [*whole, *runs.values()]

    def charge_once(self, shares: Sequence[Share]) -> None:
        """Take back what orgs were charged for a run beyond the first of the steps that it was taken for."""
        for share in shares if self._together else ():
            for lane in share.lanes:
                count = self._together.pop((share.org_id, lane.lane_id), 0)
                lane.together += count
                share.virtual_s -= count * lane.estimate_s / share.weight

    async def seat_called(
        self, con: Connection, leases: Sequence[tuple[int, uuid.UUID, uuid.UUID]]
    ) -> None:
        """Give the steps for which runs were taken their room, under the new leases (org, item, token)."""
        seats = [
            _Seat(org_id, item_id, token, step.step_key, step.keys)
            for org_id, item_id, token in leases
            for step in self.called.get((org_id, item_id), ())
        ]
        await _seat(con, seats)


def _want(one: _Trying, row: Record, rooms: Sequence[Room], place: tuple[int, int] | None) -> Want:
    """Return what a step of this worker wants; what was kept for it while its run waited is its own too."""
    ask, heads = one.ask, row["heads"]
    if heads is not None and any(room.kept_for == (ask.org_id, heads) for room in rooms):
        place = (ask.org_id, heads)
    since = [at for at in (ask.since_us, row["rank"]) if at is not None]
    return Want(
        rooms=rooms,
        org_id=ask.org_id,
        queue=row["queue"],
        since_us=min(since, default=None),
        offset_us=row["offset_us"],
        virtual_s=row["virtual_s"],
        able=row["capability"].rstrip(ALONE),
        need=1 if one.needing is None else one.needing.need.tokens,
        place=place,
        bounds=ask.bounds,
    )


def _toll(crossings: Crossings, queue: str, able: str, rooms: Iterable[str]) -> Toll | None:
    """Return what a try is charged that begins, None where no other queue needs its rooms."""
    through = tuple(name for name in rooms if name in crossings.known)
    return Toll(queue, through, crossings.try_s(able), able) if through else None


def _seat_of(ask: Ask) -> _Seat:
    text = KEY_SEPARATOR.join(ask.keys)
    return _Seat(ask.org_id, ask.item_id, ask.token, ask.step_key, text)


async def _seat(con: Connection, seats: Sequence[_Seat]) -> set[int]:
    """Give tries their room; returns the ordinals of those that have it."""
    if not seats:
        return set()
    rows = await con.fetch(_SQL["seat"], *([one[nth] for one in seats] for nth in range(5)))
    return {row["ord"] for row in rows}
