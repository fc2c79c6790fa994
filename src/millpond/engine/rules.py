"""Limits: ceilings on keys, which of them hold for a lane, and the arithmetic of rates. Pure: no I/O, no clock.

Called by `limiting` (the claim), `ceilings` (what people set) and `why`. Invariants: a room is counted for itself; of
the limits of one owner the most exact pattern holds for a room; limits of platform and org hold beside each other, and
a brake beside both: it lowers them and never raises one;
whatever keys a lane has and whatever text names a room, reading them never raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import ceil, floor
from typing import Literal, NamedTuple

from millpond.engine.brakes import NO_CEILING, Brake
from millpond.engine.keying import PAIR, keys_of, noun_of
from millpond.engine.tokens import NOUN
from millpond.types import NO_ORG

Kind = Literal["concurrency", "rate", "tokens", "brake"]
# What can be set; a brake is told of by workers.
KINDS: tuple[Kind, ...] = ("concurrency", "rate", "tokens")
# So many per period, kept by a meter: requests, of which each item is one, and tokens, of which it needs many.
METERED = frozenset({"rate", "tokens"})
BRAKE: Kind = "brake"
_US = 1_000_000
# A rate's burst is earned again within this time, so that its meter stays far below 2⁶³ µs.
MAX_SPAN_S = 366 * 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A limit as it was set: by the platform (`owner` 0) or by an org for itself.

    `key` is `noun:name`, `noun:*` (each name for itself) or two of these joined by `×`. A rate is `maximum` per
    `period_s`, and up to `burst` at once; so are tokens. `of_org` is the org that the key names exactly. What a `brake`
    lets go depends on the time (`rule_at`).
    """

    owner: int
    key: str
    kind: Kind
    maximum: int
    period_s: float | None = None
    burst: int | None = None
    of_org: int | None = None
    brake: Brake | None = None

    @property
    def interval_us(self) -> int:
        """The time between two admissions at the rate, in whole microseconds: never shorter than it is."""
        assert self.period_s is not None
        return max(1, min(MAX_SPAN_S * _US, ceil(self.period_s * _US / max(1, self.maximum))))

    @property
    def is_metered(self) -> bool:
        """Whether it is so many per period."""
        return self.kind in METERED

    @property
    def is_of_tokens(self) -> bool:
        """Whether items take of it what they need, and not one each."""
        return self.kind == "tokens"

    @property
    def at_once(self) -> int:
        """How many may go at once at a rate."""
        return self.burst or 1

    @property
    def span_us(self) -> int:
        """How far a rate's meter may be ahead: the time in which all of its burst is earned."""
        return min(MAX_SPAN_S * _US, self.cost_us(self.at_once))

    @property
    def period_us(self) -> int:
        """The time in which `maximum` are earned."""
        assert self.period_s is not None
        return max(1, ceil(self.period_s * _US))

    @property
    def pace(self) -> float:
        """How many microseconds one takes to come, on average; of tokens that is less than one, often."""
        return self.period_us / (self.maximum or self.at_once)

    def cost_us(self, count: int) -> int:
        """Return the time in which so many are earned: requests each in whole microseconds, tokens all together."""
        if self.kind != "tokens":
            return count * self.interval_us
        return min(MAX_SPAN_S * _US, -(-count * self.period_us // (self.maximum or self.at_once)))

    def earned(self, time_us: int) -> int:
        """Return how many are earned in a time: of none that `cost_us` tells of fewer than it was asked for."""
        if self.kind != "tokens":
            return time_us // self.interval_us
        return time_us * (self.maximum or self.at_once) // self.period_us


class RoomId(NamedTuple):
    """What is counted for itself: what holds `key`, of one org or (0) of all, under a limit of `owner`.

    An empty key stands for all work of the org.
    """

    kind: str
    owner: int
    org_id: int
    key: str

    @property
    def text(self) -> str:
        """The id as one text, as the database keeps it."""
        return f"{self.kind} {self.owner} {self.org_id} {self.key}"

    @classmethod
    def parse(cls, text: str) -> RoomId:
        """Read what `text` wrote, or the name under which lanes stand there; else it names a room without a limit."""
        kind, owner, org_id, key = [*text.split(" ", 3), "", "", ""][:4]
        if kind.startswith(NOUN):
            kind = NOUN
        if not (owner.isdecimal() and org_id.isdecimal()):
            return cls("", NO_ORG, NO_ORG, text)
        return cls(kind, int(owner), int(org_id), key)


class Place(NamedTuple):
    """A room of a lane, with the limit that holds in it."""

    room: RoomId
    rule: Rule


_Scope = int | str | None


@dataclass(slots=True)
class _Owned:
    """The limits of one owner by kind, org that they are of, and pattern."""

    by: dict[tuple[str, _Scope, str], Rule] = field(default_factory=dict)
    pairs: int = 0


@dataclass
class Rules:
    """All limits of an installation, arranged so that the rooms of a lane are found by look-ups."""

    _set: dict[tuple[int, str, str], Rule] = field(default_factory=dict)
    _owned: dict[int, _Owned] = field(default_factory=dict)
    _brakes: dict[tuple[int, str], Brake] = field(default_factory=dict)
    _of_tokens: int = 0

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> Rules:
        """Arrange limits; the last of those that say the same holds."""
        made = cls()
        for rule in rules:
            made.put(rule)
        return made

    def put(self, rule: Rule) -> None:
        """Let a limit hold, in place of what its owner said before for the same key and kind."""
        self.drop(rule.owner, rule.key, rule.kind)
        self._set[rule.owner, rule.key, rule.kind] = rule
        owned = self._owned.setdefault(rule.owner, _Owned())
        org, key = _parted(rule)
        owned.by[rule.kind, org, key] = rule
        owned.pairs += PAIR in key
        self._of_tokens += rule.is_of_tokens

    def drop(self, owner: int, key: str, kind: str) -> None:
        """Let a limit hold no more; one that is none is no error."""
        rule = self._set.pop((owner, key, kind), None)
        if rule is None:
            return
        owned = self._owned[owner]
        org, key = _parted(rule)
        if owned.by.get((kind, org, key)) is rule:
            del owned.by[kind, org, key]
        owned.pairs -= PAIR in key
        self._of_tokens -= rule.is_of_tokens
        if not owned.by:
            del self._owned[owner]

    def brake(self, owner: int, key: str, brake: Brake | None) -> None:
        """Let a brake hold, in place of what its owner had on the key; None takes it off."""
        if brake is None:
            self._brakes.pop((owner, key), None)
        else:
            self._brakes[owner, key] = brake

    def brakes(self) -> Iterable[Brake]:
        """Return all brakes, also those that have worn off."""
        return self._brakes.values()

    def __bool__(self) -> bool:
        return bool(self._set) or bool(self._brakes)

    @property
    def has_tokens(self) -> bool:
        """Whether there are limits on tokens."""
        return self._of_tokens > 0

    def places(
        self, org_id: int, queue: str, capability: str, keys: Sequence[str]
    ) -> tuple[Place, ...]:
        """Return the rooms that a work item of a lane needs, in one order for all lanes."""
        found: list[Place] = []
        if self._brakes:
            found += self._braked(org_id, keys_of(queue, capability, keys))
        for owner in (NO_ORG, org_id):
            if (owned := self._owned.get(owner)) is None:
                continue
            counted = list(keys_of(queue, capability, keys))
            if owned.pairs:
                counted += [PAIR.join(sorted(pair)) for pair in combinations(counted, 2)]
            for kind in KINDS:
                found += _of_owner(owned, kind, owner, org_id, counted)
        return tuple(sorted(found, key=lambda place: place.room))

    def may_pair(self, org_id: int, keys: Sequence[str]) -> bool:
        """Whether a limit on a pair may hold for one of these keys and another one."""
        mine = {pattern for key in keys for pattern in _patterns(key)}
        return any(
            PAIR in pattern and not mine.isdisjoint(pattern.split(PAIR))
            for owner in (NO_ORG, org_id)
            if (owned := self._owned.get(owner)) is not None and owned.pairs
            for _, _, pattern in owned.by
        )

    def _braked(self, org_id: int, keys: Sequence[str]) -> Iterable[Place]:
        for owner in (NO_ORG, org_id):
            for key in keys:
                room = RoomId(BRAKE, owner, owner, key)
                if rule := self.rule_of(room):
                    yield Place(room, rule)

    def rule_at(self, room: RoomId, rule: Rule, now_us: int) -> Rule:
        """Return what a limit, or a brake, allows in its room now."""
        if rule.brake is not None:
            return replace(rule, maximum=rule.brake.ceiling_at(now_us))
        if not self._brakes:
            return rule
        factor = 1.0
        for owner in {NO_ORG, room.owner, room.org_id}:
            for key in room.key.split(PAIR):
                if brake := self._brakes.get((owner, key)):
                    factor = min(factor, brake.factor_at(now_us))
        return rule if factor >= 1.0 else slowed(rule, factor)

    def rule_of(self, room: RoomId) -> Rule | None:
        """Return the limit that holds in a room now, None when there is none any more."""
        if room.kind == BRAKE:
            brake = self._brakes.get((room.owner, room.key))
            if brake is None:
                return None
            return Rule(owner=room.owner, key=room.key, kind=BRAKE, maximum=NO_CEILING, brake=brake)
        if (owned := self._owned.get(room.owner)) is None:
            return None
        scopes: tuple[_Scope, ...] = (room.org_id, "*") if room.org_id else (None,)
        if room.owner != NO_ORG:
            scopes = (None, room.org_id, "*") if not room.key else (None,)
        return _first(owned, room.kind, scopes, room.key)


def _of_owner(
    owned: _Owned, kind: Kind, owner: int, org_id: int, counted: Sequence[str]
) -> Iterable[Place]:
    if rule := _first(owned, kind, (org_id, "*"), ""):
        yield Place(RoomId(kind, owner, org_id, ""), rule)
    for key in counted:
        if owner != NO_ORG:
            if rule := _first(owned, kind, (None,), key):
                yield Place(RoomId(kind, owner, org_id, key), rule)
            continue
        if rule := _first(owned, kind, (None,), key):
            yield Place(RoomId(kind, owner, NO_ORG, key), rule)
        if rule := _first(owned, kind, (org_id, "*"), key):
            yield Place(RoomId(kind, owner, org_id, key), rule)


def _first(owned: _Owned, kind: str, scopes: Sequence[_Scope], key: str) -> Rule | None:
    """Return the most exact limit: the org named before any, then the key named before its pattern."""
    for scope in scopes:
        for pattern in _patterns(key):
            if rule := owned.by.get((kind, scope, pattern)):
                return rule
    return None


def _parted(rule: Rule) -> tuple[_Scope, str]:
    """Part a limit's key into the org that it is of (None for none, `*` for each) and the rest."""
    parts = rule.key.split(PAIR)
    if not parts[0].startswith("org:"):
        return None, rule.key
    rest = PAIR.join(parts[1:])
    if rule.owner != NO_ORG:
        return ("*", "") if not rest else (None, rest)
    return ("*" if parts[0] == "org:*" else rule.of_org), rest


def _patterns(key: str) -> Iterable[str]:
    """Return what may be written for a key, the most exact first."""
    if not key:
        yield ""
        return
    if PAIR not in key:
        yield key
        yield f"{noun_of(key)}:*"
        return
    first, _, second = key.partition(PAIR)
    any_first, any_second = f"{noun_of(first)}:*", f"{noun_of(second)}:*"
    yield key
    yield f"{first}{PAIR}{any_second}"
    yield f"{any_first}{PAIR}{second}"
    yield f"{any_first}{PAIR}{any_second}"


def slowed(rule: Rule, factor: float) -> Rule:
    """Return a limit lowered to a part of it: never to nothing, and a rate by a longer period.

    The burst of a rate stays, so that its meter is never cut below what the whole of it would say.
    """
    if rule.is_metered:
        assert rule.period_s is not None
        return replace(rule, period_s=rule.period_s / factor)
    return replace(rule, maximum=min(rule.maximum, max(1, floor(rule.maximum * factor))))
