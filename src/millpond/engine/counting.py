"""Counting: rooms as one claim finds them: what is in use, what is left, when there is more. Pure: no I/O, no clock.

Called by `limiting` and, on a virtual clock, `standing`. Invariant: a room is one object for all lanes that need it,
so that what one takes, others miss.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from millpond.engine.admission import Lane, Room, Share
from millpond.engine.brakes import NO_CEILING
from millpond.engine.keeping import Waiting, keep_rooms
from millpond.engine.lanes import ALONE
from millpond.engine.pacing import allowed, corrected, meter_us, next_at_us, repaced, spent
from millpond.engine.rules import Place, RoomId, Rule, Rules
from millpond.engine.tokens import Need, need_at, stand

AT_ONCE, NEVER = 0, 2**62
# So long a head that needs several rooms is passed over before one of each is kept for it.
PATIENCE_S = 5.0
# Of so many lanes of an org at most: the next ones wait until these have gone.
MAX_WAITERS = 2


@dataclass(kw_only=True, slots=True)
class State:
    """A room in this claim; `tat_us` is a rate's meter, None where nothing went before.

    `rule` is what holds at the time of this claim. `is_cut`: an earlier, slower limit had put the meter further ahead
    than the present one can, and it has to be stored where it now is, or it would stand as far ahead of every later
    claim.
    """

    rule: Rule
    room: Room
    in_use: int
    tat_us: int | None = None
    is_cut: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether the end of other work gives place here."""
        return self.rule.kind != "rate" and self.rule.maximum > 0

    @property
    def is_boundless(self) -> bool:
        """Whether nothing is held back here any more: a brake that has worn off."""
        return self.rule.brake is not None and self.rule.maximum >= NO_CEILING

    def meter_us(self, now_us: int) -> int:
        """Return the meter after what went in this claim."""
        return spent(self.rule, self.tat_us, now_us, self.room.went)

    def plan_us(self, now_us: int, need: Need | None = None) -> int:
        """Return when to look at lanes that are parked here now, after what goes in this claim.

        `need` is theirs where this is a limit on tokens; what needs more than the whole of it waits for another limit.
        """
        if self.rule.maximum < 1:
            return NEVER if self.rule.brake is None else self.rule.brake.until_us
        count = self.cost(need)
        if not self.rule.is_metered or self.room.left >= count:
            return AT_ONCE
        if count > self.rule.at_once:
            return NEVER
        # What is left for others is as good as gone.
        gone = self.room.went + self.room.spared
        return next_at_us(self.rule, spent(self.rule, self.tat_us, now_us, gone), count)

    def cost(self, need: Need | None) -> int:
        """Return how many an item takes here; what was only learned is never more than all that there is."""
        if need is None or not self.room.is_weighed:
            return 1
        return need.tokens if need.is_declared else min(need.tokens, self.rule.at_once)


@dataclass(slots=True)
class Counts:
    """What one claim has read; `awaited` are rooms under which lanes stand until other work ends.

    Of rates and tokens it has meters (`tats`); of tokens also their `paces`, and `deltas`, by which more or fewer were
    used than had been reserved.
    """

    now_us: int = 0
    tats: dict[str, int | None] = field(default_factory=dict)
    paces: dict[str, float | None] = field(default_factory=dict)
    deltas: dict[str, int] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    rules: Rules = field(default_factory=Rules)
    _in_use: Counter[RoomId] = field(default_factory=Counter)
    _states: dict[RoomId, State] = field(default_factory=dict)
    _lanes: dict[tuple[int, int], tuple[str, tuple[Place, ...]]] = field(default_factory=dict)
    _held: list[tuple[str, tuple[Place, ...]]] = field(default_factory=list)

    def add_held(self, capability: str, places: tuple[Place, ...], count: int) -> None:
        """Count the leases of a lane in its rooms."""
        self._held.append((capability, places))
        for room, rule in places:
            if not rule.is_metered:
                self._in_use[room] += count

    def state(self, room_id: RoomId, rule: Rule) -> State:
        """Return a room under the limit that holds there, as brakes have lowered it by now."""
        state = self._states.get(room_id)
        if state is None:
            rule = self.rules.rule_at(room_id, rule, self.now_us)
            text = room_id.text
            tat_us, in_use = self.tats.get(text), self._in_use[room_id]
            left, is_cut = rule.maximum - in_use, False
            if rule.is_of_tokens:
                tat_us = repaced(rule, tat_us, self.paces.get(text), self.now_us)
                if (delta := self.deltas.get(text)) is not None:
                    tat_us, is_cut = corrected(rule, tat_us, self.now_us, delta), True
                left = allowed(rule, tat_us, self.now_us)
            elif rule.is_metered:
                left = allowed(rule, tat_us, self.now_us)
                is_cut = tat_us is not None and tat_us > self.now_us + rule.span_us
                if is_cut:
                    tat_us = meter_us(rule, tat_us, self.now_us)
            room = Room(left=left, org_id=room_id.org_id, name=text, is_weighed=rule.is_of_tokens)
            state = State(rule=rule, room=room, in_use=in_use, tat_us=tat_us, is_cut=is_cut)
            self._states[room_id] = state
        return state

    def states(self) -> dict[str, State]:
        """Return the rooms that were looked at, by name."""
        return {state.room.name: state for state in self._states.values()}

    def rooms(
        self, lane: tuple[int, int], capability: str, places: tuple[Place, ...]
    ) -> list[Room]:
        """Return the rooms in which every item of a lane (org, lane) takes a place."""
        self._lanes[lane] = (capability, places)
        return [self.state(place.room, place.rule).room for place in places]

    def can_wait(
        self, lane: tuple[int, int], need: int = 1, needs: Mapping[str, int] | None = None
    ) -> bool:
        """Whether room may be kept for a lane's head: it needs more than one place, and nothing of it is closed."""
        _, places = self._lanes[lane]
        is_much = len(places) > 1 or any(place.rule.is_of_tokens for place in places)
        return is_much and not self.is_closed(places, need, needs)

    def is_closed(
        self, places: Iterable[Place], need: int = 1, needs: Mapping[str, int] | None = None
    ) -> bool:
        """Whether no end of other work lets an item go that needs these: one of them is closed, or cools down.

        So is one on tokens of which it needs more than there ever are at once.
        """
        for place in places:
            rule = self.rules.rule_at(*place, self.now_us)
            if rule.maximum < 1:
                return True
            most = need if needs is None else needs.get(place.room.text, need)
            if rule.is_of_tokens and most > rule.at_once:
                return True
        return False

    def meters(self) -> list[tuple[str, int, float | None]]:
        """Return the meters of rates to store: those under which something went, and those that were cut.

        Those of tokens with their pace.
        """
        changed = [
            one
            for one in self._states.values()
            if one.rule.is_metered and (one.room.went > 0 or one.is_cut)
        ]
        for one in changed:
            one.is_cut = False
        return [
            (
                one.room.name,
                one.meter_us(self.now_us),
                one.rule.pace if one.rule.is_of_tokens else None,
            )
            for one in changed
        ]

    def paced(self, shares: Sequence[Share]) -> set[tuple[int, uuid.UUID]]:
        """Return what was taken that a rate let go, as org and item."""
        rates = {one.room.name for one in self._states.values() if one.rule.kind == "rate"}
        return {
            (share.org_id, item)
            for share in shares
            for lane in share.lanes
            if lane.taken and any(room.name in rates for room in lane.rooms)
            for item in lane.items[: lane.taken]
        }

    def add_taken(self, lanes: Iterable[tuple[Share, Lane]]) -> None:
        """Note of what lanes work went: it holds places from now on."""
        self._held += [
            self._lanes[share.org_id, lane.lane_id] for share, lane in lanes if lane.taken
        ]

    def holders(self) -> frozenset[str]:
        """Return the capabilities of the work whose end gives place in rooms that are awaited."""
        if not self.awaited:
            return frozenset()
        return frozenset(
            able.rstrip(ALONE)
            for able, places in self._held
            if any(place.room.text in self.awaited for place in places)
        )


def weighed(need: Need, places: Iterable[Place]) -> Need | None:
    """Return what each item of a lane takes of limits on tokens; None where it is under none."""
    rules = [rule for _, rule in places if rule.is_of_tokens]
    if not rules or need.is_declared:
        return need if rules else None
    return need._replace(tokens=min(need.tokens, *(rule.at_once for rule in rules)))


def keep(waiting: Sequence[tuple[Waiting, bool]]) -> list[tuple[int, int]]:
    """Keep room for heads that waited long; returns the lanes of those that can go now.

    Only of those is returned that this claim can let go at all (true).
    """
    keep_rooms([one for one, _ in waiting])
    return [(one.org_id, one.lane_id) for one, is_able in waiting if is_able and _can_go(one)]


def _can_go(one: Waiting) -> bool:
    place = (one.org_id, one.lane_id)
    return all(room.left >= one.cost(room) and room.kept_for == place for room in one.rooms)


def most_awake(state: State | None, need: Need | None = None) -> int:
    """Return how many lanes that stand under a room may be awake; without a state it has no limit any more."""
    if state is None:
        return NO_CEILING
    kept = 0 if state.room.kept_for is None else state.room.kept
    return (state.room.left - kept) // state.cost(need)


def stand_of(room: Room, need: Need | None) -> str:
    """Name where a lane stands that waits for a room: on tokens by what it needs too."""
    return stand(room.name, need) if room.is_weighed and need is not None else room.name


def base_of(name: str) -> tuple[str, Need | None]:
    """Return the room, and what lanes need, of a name under which lanes stand."""
    need = need_at(name)
    return (name, None) if need is None else (RoomId.parse(name).text, need)
