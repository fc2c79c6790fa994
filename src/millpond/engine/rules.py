"""Limits: ceilings on keys, which of them hold for a lane, and the arithmetic of rates. Pure: no I/O, no clock.

Called by `limiting` (the claim), `ceilings` (what people set) and `why`. Invariants: a room is counted for itself; of
the limits of one owner the most exact pattern holds for a room; limits of platform and org hold beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple

from millpond.errors import InvalidInput
from millpond.types import NO_ORG

Kind = Literal["concurrency", "rate"]
KINDS: tuple[Kind, ...] = ("concurrency", "rate")
PAIR = "×"
MAX_KEYS = 16
NO_CEILING = 2**31
# Every work item has these without declaring them: its org, its queue, and a run's flow.
IMPLIED = frozenset({"org", "queue", "flow"})
_US = 1_000_000
_PART = re.compile(r"[a-z][a-z0-9_]{0,29}:(?:\*|[^\s*×\x00-\x1f\x7f]{1,200})")
_PAIRING = re.compile(r"\s*×\s*|\s+x\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A limit as it was set: by the platform (`owner` 0) or by an org for itself.

    `key` is `noun:name`, `noun:*` (each name for itself) or two of these joined by `×`. A rate is `maximum` per
    `period_s`, and up to `burst` at once. `of_org` is the org that the key names exactly.
    """

    owner: int
    key: str
    kind: Kind
    maximum: int
    period_s: float | None = None
    burst: int | None = None
    of_org: int | None = None

    @property
    def interval_us(self) -> int:
        """The time between two admissions at the rate, in microseconds; at least 1."""
        assert self.period_s is not None
        return max(1, round(self.period_s * _US / max(1, self.maximum)))

    @property
    def at_once(self) -> int:
        """How many may go at once at a rate."""
        return self.burst or 1


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
        """Read what `text` wrote."""
        kind, owner, org_id, key = text.split(" ", 3)
        return cls(kind, int(owner), int(org_id), key)


class Place(NamedTuple):
    """A room of a lane, with the limit that holds in it."""

    room: RoomId
    rule: Rule


def parse_key(text: str) -> str:
    """Return a limit's key in its one way of writing; raises InvalidInput.

    The two parts of a pair are written with `×` or with an `x` between spaces; an org goes first.
    """
    parts = [part.strip() for part in _PAIRING.split(text.strip())]
    if not 1 <= len(parts) <= 2 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidInput(
            f"{text[:200]!r} is no key of a limit",
            code="limit_key_malformed",
            param="key",
            advice="write noun:name, noun:*, or two of these with × between them",
        )
    parts.sort(key=lambda part: (not part.startswith("org:"), part))
    if len(parts) == 2 and noun_of(parts[0]) == noun_of(parts[1]):
        raise InvalidInput(
            "a pair is of two different nouns", code="limit_key_malformed", param="key"
        )
    return PAIR.join(parts)


def check_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of a run, sorted and each once; raises InvalidInput for what is none."""
    if len(keys) > MAX_KEYS:
        raise InvalidInput(f"a run has at most {MAX_KEYS} keys", param="keys")
    for key in keys:
        if not _PART.fullmatch(key) or "*" in key:
            raise InvalidInput(
                f"{key[:200]!r} is no key: write noun:name, such as provider:openai", param="keys"
            )
        if noun_of(key) in IMPLIED:
            raise InvalidInput(
                f"{key[:200]}: every run has the keys of its org, queue and flow by itself",
                param="keys",
            )
    return tuple(sorted(set(keys)))


def noun_of(part: str) -> str:
    """Return what stands before the colon."""
    return part.split(":", 1)[0]


def keys_of(queue: str, capability: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Return all keys of a lane but that of its org; `capability` is `flow@version` or `step:name`."""
    implied = [f"queue:{queue}"]
    if not capability.startswith("step:"):
        implied.append(f"flow:{capability.rsplit('@', 1)[0]}")
    return (*implied, *keys)


@dataclass
class Rules:
    """All limits of an installation, arranged so that the rooms of a lane are found by look-ups."""

    _by: dict[tuple[str, int, int | str | None, str], Rule] = field(default_factory=dict)
    _owners: set[int] = field(default_factory=set)
    _has_pairs: bool = False

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> Rules:
        """Arrange limits; the last of those that say the same holds."""
        made = cls()
        for rule in rules:
            org, key = _parted(rule)
            made._by[rule.kind, rule.owner, org, key] = rule
            made._owners.add(rule.owner)
            made._has_pairs = made._has_pairs or PAIR in key
        return made

    def __bool__(self) -> bool:
        return bool(self._by)

    def places(
        self, org_id: int, queue: str, capability: str, keys: Sequence[str]
    ) -> tuple[Place, ...]:
        """Return the rooms that a work item of a lane needs, in one order for all lanes."""
        if not self._by:
            return ()
        counted = list(keys_of(queue, capability, keys))
        if self._has_pairs:
            counted += [PAIR.join(sorted(pair)) for pair in combinations(counted, 2)]
        found: list[Place] = []
        for owner in (NO_ORG, org_id):
            if owner not in self._owners:
                continue
            for kind in KINDS:
                found += self._of_owner(kind, owner, org_id, counted)
        return tuple(sorted(found))

    def rule_of(self, room: RoomId) -> Rule | None:
        """Return the limit that holds in a room now, None when there is none any more."""
        scopes: tuple[int | str | None, ...] = (room.org_id, "*") if room.org_id else (None,)
        if room.owner != NO_ORG:
            scopes = (None, room.org_id, "*") if not room.key else (None,)
        return self._first(room.kind, room.owner, scopes, room.key)

    def _of_owner(
        self, kind: Kind, owner: int, org_id: int, counted: Sequence[str]
    ) -> Iterable[Place]:
        if rule := self._first(kind, owner, (org_id, "*"), ""):
            yield Place(RoomId(kind, owner, org_id, ""), rule)
        for key in counted:
            if owner != NO_ORG:
                if rule := self._first(kind, owner, (None,), key):
                    yield Place(RoomId(kind, owner, org_id, key), rule)
                continue
            if rule := self._first(kind, owner, (None,), key):
                yield Place(RoomId(kind, owner, NO_ORG, key), rule)
            if rule := self._first(kind, owner, (org_id, "*"), key):
                yield Place(RoomId(kind, owner, org_id, key), rule)

    def _first(
        self, kind: str, owner: int, scopes: Sequence[int | str | None], key: str
    ) -> Rule | None:
        """Return the most exact limit: the org named before any, then the key named before its pattern."""
        for scope in scopes:
            for pattern in _patterns(key):
                if rule := self._by.get((kind, owner, scope, pattern)):
                    return rule
        return None


def _parted(rule: Rule) -> tuple[int | str | None, str]:
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
    first, second = key.split(PAIR)
    any_first, any_second = f"{noun_of(first)}:*", f"{noun_of(second)}:*"
    yield key
    yield f"{first}{PAIR}{any_second}"
    yield f"{any_first}{PAIR}{second}"
    yield f"{any_first}{PAIR}{any_second}"


# Requests per period: the generic cell rate algorithm (ITU-T I.371), kept as the theoretical arrival time.


def allowed(rule: Rule, tat_us: int | None, now_us: int) -> int:
    """Return how many may go now at a rate; `tat_us` is the meter, None where nothing went before."""
    if rule.maximum < 1:
        return 0
    ahead_us = max(0, (now_us if tat_us is None else tat_us) - now_us)
    return max(0, rule.at_once - -(-ahead_us // rule.interval_us))


def spent(rule: Rule, tat_us: int | None, now_us: int, count: int) -> int:
    """Return the meter after `count` went now."""
    return max(now_us, now_us if tat_us is None else tat_us) + count * rule.interval_us


def next_at_us(rule: Rule, tat_us: int) -> int:
    """Return from when on one more may go."""
    return tat_us - (rule.at_once - 1) * rule.interval_us
