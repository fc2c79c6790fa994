"""Boarding: what a claim reads and writes of steps that need room beside their runs.

Called by `claim`, within its transaction. Invariants: a step gets room in a claim alone, in all its rooms at once,
and its row is on disk before it begins; one that asks takes what is left after the work in line, and not what others
could take of it now, unless it has been passed over for long; a picked step of a waiting run readies that run, which
the same claim takes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.admission import Pick
from millpond.engine.counting import PATIENCE_S
from millpond.engine.lanes import ALONE, KEY_SEPARATOR, PRIORITY_STEP_US, RESUME_LEAD_US
from millpond.engine.limiting import Limiter
from millpond.engine.needs import APART, Answer, Ask, name_of, needed
from millpond.engine.reservations import Needing, Taken
from millpond.engine.rules import Place
from millpond.engine.seats import Want, give_back, seat
from millpond.engine.tokens import above_limit
from millpond.errors import InvalidInput

_SQL = queries("needs")
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
    """The asks of one claim and their `answers`.

    `called` are the steps for whose sake it took runs, by run; `run_of` and `step_of` name the run and the step by the
    step's id in line.
    """

    def __init__(self, limits: Limiter, worker_id: uuid.UUID) -> None:
        self._limits = limits
        self._worker_id = worker_id
        self._lines: set[tuple[int, int]] = set()
        self.asks: Sequence[Ask] = ()
        self.answers: dict[Ask, Answer] = {}
        self.called: dict[_Id, list[tuple[str, str]]] = {}
        self.run_of: dict[_Id, _Id] = {}
        self.step_of: dict[_Id, str] = {}

    def begin(self, asks: Sequence[Ask]) -> None:
        """Make ready for a claim."""
        self.asks = asks
        self.answers = {}
        self.called = {}
        self.run_of, self.step_of = {}, {}
        self._lines = set()

    # Steps of runs under leases

    async def let_on_old(self, con: Connection) -> None:
        """Let steps begin that were passed over for long, before any work in line, or let places be kept for them."""
        now_us = self._limits.now_us
        old = [
            one
            for one in self.asks
            if one.since_us is not None and now_us - one.since_us >= PATIENCE_S * 1e6
        ]
        if old:
            await self._let_on(con, old, None)

    async def let_on(self, con: Connection, idle: Mapping[str, int]) -> None:
        """Let the others begin, with what is left; `idle` are slots of this worker that nothing took, by queue."""
        left = [one for one in self.asks if one not in self.answers]
        if left:
            await self._let_on(con, left, [queue for queue, slots in idle.items() if slots > 0])

    async def _let_on(
        self, con: Connection, asks: Sequence[Ask], idle: Sequence[str] | None
    ) -> None:
        rows = await con.fetch(
            _SQL["riders"],
            [one.org_id for one in asks],
            [one.item_id for one in asks],
            [one.token for one in asks],
            [one.step_key for one in asks],
        )
        now_us = self._limits.now_us
        # One whose lease is gone is not among the rows: its attempt will hear of that.
        answers = dict.fromkeys(asks, Answer(is_seated=False, now_us=now_us))
        wanted: list[_Trying] = []
        for row in rows:
            ask = asks[row["ord"] - 1]
            if row["has_room"]:  # of a claim whose answer was lost
                answers[ask] = Answer(is_seated=True, has_row=True, now_us=now_us)
                continue
            able = row["capability"].rstrip(ALONE)
            rules = self._limits.rules
            places = needed(rules, ask.org_id, row["queue"], able, row["keys"], ask.keys)
            needing = self._limits.reservations.of_try(able, row["keys"], ask.keys, places)
            trying = _Trying(ask, places, needing)
            if not places:
                answers[ask] = Answer(is_seated=True, now_us=now_us)
            elif refusal := trying.refusal():
                answers[ask] = Answer(is_seated=False, now_us=now_us, refusal=refusal)
            else:
                wanted.append(trying)
        if wanted:
            answers |= await self._decide(con, wanted, idle)
        self.answers |= answers

    async def _decide(
        self,
        con: Connection,
        wanted: Sequence[_Trying],
        idle: Sequence[str] | None,
    ) -> dict[Ask, Answer]:
        """Let those begin for whom there is room; `idle` is None for those that go before work in line."""
        limits = self._limits
        await limits.meter(con, [place for one in wanted for place in one.places])
        wants = [
            Want(
                rooms=[limits.room(one) for one in places],
                need=1 if needing is None else needing.need.tokens,
                place=limits.place_of(ask.item_id, ask.step_key),
            )
            for ask, places, needing in wanted
        ]
        ahead = {} if idle is None else await self._ahead(con, wants, idle)
        seat(wants, ahead)
        answers: dict[Ask, Answer] = {}
        tries: list[tuple[_Trying, Want]] = []
        asking: list[Ask] = []
        for one, want in zip(wanted, wants, strict=True):
            ask, places, needing = one
            if want.full is not None:
                limits.put_off(want.full, None if needing is None else needing.need)
                if idle is None and want.place is None:
                    asking.append(ask)
                answers[ask] = Answer(is_seated=False, now_us=limits.now_us)
                continue
            is_paced = any(place.rule.kind == "rate" for place in places)
            begin_by = limits.began + LATE_S if is_paced else None
            answers[ask] = Answer(
                is_seated=True, has_row=True, begin_by=begin_by, now_us=limits.now_us
            )
            tries.append((one, want))
        seated = await _seat(con, [_seat_of(one.ask) for one, _ in tries])
        taken: list[Taken] = []
        for nth, (one, want) in enumerate(tries, 1):
            if nth in seated:
                taken += one.taken()
            else:
                give_back(want)
                answers[one.ask] = Answer(is_seated=False, now_us=limits.now_us)
        await limits.reservations.reserve(con, taken)
        if asking:
            kept = [_seat_of(ask) for ask in asking]
            columns = [[one[nth] for one in kept] for nth in range(5)]
            await con.execute(_SQL["ask"], *columns, [ask.since_us for ask in asking])
        await limits.spend(con)
        return answers

    async def _ahead(
        self, con: Connection, wants: Sequence[Want], idle: Sequence[str]
    ) -> dict[str, int]:
        """Return how much work in line could take of these rooms now, by room."""
        left = {one.name: one for want in wants for one in want.rooms if one.left > 0}
        ahead: dict[str, int] = {}
        if not left or not self._limits.has_rooms:
            return ahead
        if names := [name for name, room in left.items() if not room.is_weighed]:
            rows = await con.fetch(_SQL["ahead"], names, self._worker_id, idle)
            ahead |= {row["room"]: row["lanes"] for row in rows}
        if weighed := [room for room in left.values() if room.is_weighed]:
            columns = [room.name for room in weighed], [room.left for room in weighed]
            rows = await con.fetch(_SQL["ahead_of_tokens"], *columns, self._worker_id, idle)
            ahead |= {row["room"]: row["tokens"] for row in rows}
        return ahead

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
            runs.setdefault(run, Pick(run[0], row["lane_id"], row["rank"], run[1], helpers[need]))
            self.called.setdefault(run, []).append((row["step_key"], row["keys"]))
            self.run_of[need], self.step_of[need] = run, row["step_key"]
        whole = [one for one in picks if (one.org_id, one.lane_id) not in self._lines]
        return [*whole, *runs.values()]

    async def seat_called(
        self, con: Connection, leases: Sequence[tuple[int, uuid.UUID, uuid.UUID]]
    ) -> None:
        """Give the steps for which runs were taken their room, under the new leases (org, item, token)."""
        seats = [
            _Seat(org_id, item_id, token, *step)
            for org_id, item_id, token in leases
            for step in self.called.get((org_id, item_id), ())
        ]
        await _seat(con, seats)


def _seat_of(ask: Ask) -> _Seat:
    text = KEY_SEPARATOR.join(ask.keys)
    return _Seat(ask.org_id, ask.item_id, ask.token, ask.step_key, text)


async def _seat(con: Connection, seats: Sequence[_Seat]) -> set[int]:
    """Give tries their room; returns the ordinals of those that have it."""
    if not seats:
        return set()
    rows = await con.fetch(_SQL["seat"], *([one[nth] for one in seats] for nth in range(5)))
    return {row["ord"] for row in rows}
