"""Due rooms: which rooms with lanes under them a claim looks at, which lanes it wakes, and when it looks again.

Called by `limiting`, within the claim's transaction and after its lock. Invariants: every room comes to its turn,
however many there are; no more lanes are awake than their room has place for; only what holds for every worker is
written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.counting import AT_ONCE, NEVER, Counts, State, base_of, most_awake
from millpond.engine.crossings import Crossings
from millpond.engine.lanes import ALONE
from millpond.engine.rulebook import RuleBook
from millpond.engine.rules import RoomId

_SQL = queries("limiting")
# Of one claim: how many rooms of each queue it looks at, and of how many, and how many lanes of each, it wakes.
_PAGE = 500
_MAX_ROOMS = 64
_MAX_WOKEN = 256
# A worker that could not look at all rooms of a queue in one claim claims again so soon, but lets others claim before
# that, for so many times as long as its own look took.
_NEXT_PAGE_S = 0.02
_REST = 4
_FIRST = (-1, "", "")


class Stand(NamedTuple):
    """A row of `room`: lanes of a queue and capability stand under it."""

    room: str
    queue: str
    capability: str
    due_us: int
    is_able: bool
    is_old: bool


Key = tuple[str, str, str]


class DueRooms:
    """The rooms of one claimer's queues, from claim to claim.

    `has_more`: another claim at once may let more go. `next_us`: when the next room is due, 0 for never. `crowded`:
    rooms of rates under which lanes go on standing.
    """

    def __init__(self, able: Sequence[str], book: RuleBook) -> None:
        self._able = able
        self._book = book
        self._seen = Counts()
        self._after: dict[str, tuple[int, str, str]] = {}
        self._last_woken: Key = ("", "", "")
        self._is_whole = True
        self.crowded: list[Key] = []
        self.next_us = 0
        self.has_more = False

    def begin(self, seen: Counts) -> None:
        """Make ready for a claim that counts here."""
        self._seen = seen
        self.crowded = []
        self._is_whole = True
        self.next_us = 0
        self.has_more = False

    def page(self, names: Sequence[str]) -> tuple[int, list[int], list[str], list[str]]:
        """Return how many rooms of each queue the claim reads, and after which of them, in three columns."""
        after = [self._after.get(name, _FIRST) for name in names]
        return (
            _PAGE,
            [one[0] for one in after],
            [one[1] for one in after],
            [one[2] for one in after],
        )

    def poll_s(self, poll_s: float, took_s: float) -> float:
        """Return after how long to claim again, by what is due; a look at rooms took so long."""
        if not self._is_whole:
            poll_s = min(poll_s, max(_NEXT_PAGE_S, _REST * took_s))
        if self.next_us:
            poll_s = min(poll_s, max(0.0, (self.next_us - self._seen.now_us) / 1e6))
        return poll_s

    def turn(
        self, names: Sequence[str], rows: Sequence[Record]
    ) -> tuple[list[Stand], AbstractSet[str]]:
        """Return the rooms to look at, each once; the next claim goes on after them where there may be more.

        Also returns the queues of which more rooms have a time that older limits told.
        """
        stands: dict[Key, Stand] = {}
        counts = Counter([row["queue"] for row in rows if row["lane_id"] < 2])
        old = Counter([row["queue"] for row in rows if row["lane_id"] >= 2])
        last = {row["queue"]: row for row in rows if row["lane_id"] < 2}
        for row in rows:
            if base_of(row["room"])[1] is None:
                self._seen.tats[row["room"]] = row["us"]
            key = (row["room"], row["queue"], row["capability"])
            able, is_old = bool(row["lane_id"] & 1), row["lane_id"] >= 2
            stands[key] = Stand(*key, due_us=row["n"], is_able=able, is_old=is_old)
        for name in names:
            if counts[name] < _PAGE:
                self._after.pop(name, None)
                continue
            row = last[name]
            self._after[name] = (row["n"], row["room"], row["capability"])
            self._is_whole = False
        cut = {name for name, count in old.items() if count >= _PAGE}
        self.has_more = self.has_more or bool(cut)
        return list(stands.values()), cut

    async def wake(
        self,
        con: Connection,
        stands: Sequence[Stand],
        chosen: Sequence[tuple[int, int]],
        slots: Mapping[str, int],
        crossings: Crossings,
        use_s: Callable[[Record], float],
    ) -> None:
        """Put as many lanes back into the active order as their rooms have place for.

        `use_s` is for how long an item of a lane is expected to use a room.
        """
        plans: dict[Key, int | None] = {}
        woken: list[tuple[Stand, State | None, int]] = []
        crossed: dict[str, int] = {}
        for stand in stands:
            room_id, need = RoomId.parse(stand.room), base_of(stand.room)[1]
            rule = self._book.rules.rule_of(room_id)
            state = None if rule is None else self._seen.state(room_id, rule)
            if state is not None and state.is_boundless:
                state = None
            most, due_us = min(_MAX_WOKEN, most_awake(state, need)), AT_ONCE
            if state is not None:
                due_us = state.plan_us(self._seen.now_us, need)
                if stand.is_able and state.is_counted:
                    self._seen.awaited.add(stand.room)
            if stand.is_old or (due_us != stand.due_us and due_us > self._seen.now_us):
                plans[stand[:3]] = due_us
            if stand.is_able and most > 0:
                if state and stand.room in crossings.known and stand.capability[-1] != ALONE:
                    crossed[stand.room], most = most, 0
                woken.append((stand, state, most))
        turns = await crossings.next_lanes(con, crossed, slots, self._able, use_s)
        chosen = list(dict.fromkeys([*chosen, *turns]))
        if len(woken) > _MAX_ROOMS:
            self.has_more = True
            woken = self._next_of(woken)
        if woken or chosen:
            rows = await con.fetch(
                _SQL["wake"],
                *([stand[nth] for stand, _, _ in woken] for nth in range(3)),
                [most for _, _, most in woken],
                [state is None for _, state, _ in woken],
                [org_id for org_id, _ in chosen],
                [lane_id for _, lane_id in chosen],
            )
            rates = {one[:3] for one, state, _ in woken if state and state.rule.is_metered}
            for row in rows:
                key = (row["room"], row["queue"], row["capability"])
                self.has_more = self.has_more or row["has_more"]
                if row["is_over"]:
                    plans[key] = None
                elif key in rates:
                    self.crowded.append(key)
        await self.plan(con, plans)

    def _next_of(
        self, woken: Sequence[tuple[Stand, State | None, int]]
    ) -> list[tuple[Stand, State | None, int]]:
        """Return those after the last ones, so that rooms whose lanes find no slot keep no other waiting."""
        order = sorted(woken, key=lambda one: (one[0][:3] <= self._last_woken, one[0][:3]))
        self._last_woken = order[_MAX_ROOMS - 1][0][:3]
        return order[:_MAX_ROOMS]

    async def plan(self, con: Connection, plans: dict[Key, int | None]) -> None:
        """Set when rooms are looked at again; None takes away one that no lane stands under."""
        if not plans:
            return
        await con.execute(
            _SQL["plan"],
            *([key[nth] for key in plans] for nth in range(3)),
            list(plans.values()),
            self._book.version,
        )
        self.sooner(at for at in plans.values() if at is not None)

    def sooner(self, times: Iterable[int]) -> None:
        """Let the next claim be when the first of these is due."""
        due = [at for at in [*times, self.next_us] if AT_ONCE < at < NEVER]
        self.next_us = min(due, default=0)
