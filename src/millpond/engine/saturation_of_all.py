"""Saturation of all orgs, for operators: how full queues, the platform's limits and orgs are, and what waits there.

Called by the API in a transaction of the platform. Invariants: it only reads, without the claim's lock; looks
and counts stop at caps, and say so; of what orgs hold nothing is told but how much: a key that only callers
gave stands behind its limit's pattern, and what an org limits of its own counts in its own row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.ceilings import held_by, list_platform_limits, use_of
from millpond.engine.easing import list_brakes
from millpond.engine.keying import IMPLIED, PAIR, noun_of
from millpond.engine.rules import RoomId, Rule, Rules
from millpond.engine.saturation import (
    FullShare,
    Saturation,
    slots_of,
    until_of,
    with_fullness,
)
from millpond.types import NO_ORG

_SQL = queries("saturation")
Of = Literal["queue", "limit", "org"]
OFS: tuple[Of, ...] = ("queue", "limit", "org")
# A limit's kind and key, and what one of the things is called that it counts.
_Name = tuple[str, str, str]
_MAX_LANES = 5_000
_MAX_WAITING = 10_000
# Of each org of a page.
_MAX_OF_ORG = 1000


@dataclass(slots=True)
class _Parked:
    """What waits under one limit; under one on tokens it stands in as many places as there are needs."""

    waiting: int = 0
    oldest_s: float | None = None

    def add(self, row: Record) -> None:
        """Add what stands in one place."""
        self.waiting += row["waiting"]
        self.oldest_s = max(self.oldest_s or 0.0, row["oldest_s"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What stands in rooms of the platform's limits, as read."""

    rules: Rules
    held: Counter[RoomId] = field(default_factory=Counter)
    parked: Mapping[RoomId, _Parked] = field(default_factory=dict)
    is_whole: bool = True


async def page_of_all(
    con: Connection, of: Of | None, after: tuple[Of, str] | None, limit: int
) -> tuple[list[Saturation], bool]:
    """Return a page of queues, then limits, then orgs, or of one of these, each by name; and whether more follow.

    `after` is of what sort the last entry of the page before was, and its name (of a limit: kind, key and name).
    """
    first, name = after or (OFS[0], "")
    page: list[Saturation] = []
    for sort in OFS[OFS.index(first) :]:
        if of not in (None, sort):
            continue
        read = _READERS[sort]
        found, has_more = await read(con, name if sort == first else "", limit - len(page))
        page += found
        if has_more or len(page) >= limit:
            return page, has_more or sort != (of or OFS[-1])
    return page, False


async def queues_of_all(con: Connection, after: str, limit: int) -> tuple[list[Saturation], bool]:
    """Return a page of queues by name, with slots and the ready work of all orgs, and whether more follow."""
    slots = await slots_of(con)
    rows = await con.fetch(_SQL["lines_of_all"], _MAX_LANES, _MAX_WAITING)
    lines = {row["queue"]: row for row in rows}
    is_whole = not rows or rows[0]["looked_at"] < _MAX_LANES
    named = [
        ("queue", name, _queue(name, slots.get(name), lines.get(name), is_whole=is_whole))
        for name in sorted(name for name in {*slots, *lines} if name > after)
    ]
    return await with_fullness(con, named[:limit]), len(named) > limit


def _queue(name: str, slots: Record | None, line: Record | None, *, is_whole: bool) -> Saturation:
    waiting = 0 if line is None else line["waiting"]
    in_use = 0 if slots is None else slots["in_use"]
    return Saturation(
        of="queue",
        name=name,
        own=in_use,
        in_use=in_use,
        maximum=0 if slots is None else slots["slots"],
        is_exact=False,
        waiting=waiting,
        is_waiting_exact=is_whole and waiting < _MAX_WAITING,
        oldest_s=None if line is None else line["oldest_s"],
        orgs=0 if line is None else line["orgs"],
    )


async def limits_of_all(con: Connection, after: str, limit: int) -> tuple[list[Saturation], bool]:
    """Return a page of the platform's limits that any work meets, by kind, key and name, and whether more follow."""
    found = await _found(con)
    by_name = await _by_name(con, found)
    order = sorted(name for name in by_name if " ".join(name) > after)
    rooms = [room for name in order[:limit] for room in by_name[name]]
    use = await use_of(con, [room.text for room in rooms])
    named = [
        ("room", room.text, _limit(found, room, rule, use[room.text]))
        for room in rooms
        if (rule := found.rules.rule_of(room)) is not None
    ]
    figures = iter(await with_fullness(con, named))
    page = []
    for name in order[:limit]:
        joined = _joined([next(figures) for _ in by_name[name]])
        page.append(replace(joined, name=name[2]))
    return page, len(order) > limit


async def _by_name(con: Connection, found: _Found) -> dict[_Name, list[RoomId]]:
    """Return the rooms that work stands in or under, by what they are called for operators."""
    rooms = sorted({*found.held, *found.parked})
    rows = await con.fetch(_SQL["slugs"], list({room.org_id for room in rooms}))
    slugs = {row["org_id"]: row["slug"] for row in rows}
    declared = {row["key"] for row in await con.fetch(_SQL["declared"])} if rooms else set()
    names: dict[_Name, list[RoomId]] = {}
    for room in rooms:
        rule = found.rules.rule_of(room)
        if rule is not None:
            name = (rule.kind, rule.key, _name(room, rule, declared, slugs))
            names.setdefault(name, []).append(room)
    return names


async def _found(con: Connection) -> _Found:
    rules = Rules.of(one.rule for one in await list_platform_limits(con))
    if not rules:
        return _Found(rules=rules)
    for one in await list_brakes(con):
        rules.brake(one.brake.owner, one.brake.key, one.brake)
    held: Counter[RoomId] = Counter()
    for row in await con.fetch(_SQL["held_of_all"]):
        for room, rule in held_by(rules, row["org_id"], row):
            if room.owner == NO_ORG and rule.brake is None:
                held[room] += row["items"]
    rows = await con.fetch(_SQL["parked_of_all"], _MAX_LANES, _MAX_WAITING)
    is_whole = not rows or (rows[0]["looked_at"] < _MAX_LANES and rows[0]["counted"] < _MAX_WAITING)
    parked: dict[RoomId, _Parked] = {}
    for row in rows:
        parked.setdefault(RoomId.parse(row["room"]), _Parked()).add(row)
    # Brakes are shown by themselves, and what orgs limit of their own is theirs.
    parked = {
        room: one
        for room, one in parked.items()
        if room.owner == NO_ORG and (known := rules.rule_of(room)) and known.brake is None
    }
    return _Found(rules=rules, held=held, parked=parked, is_whole=is_whole)


def _limit(found: _Found, room: RoomId, rule: Rule, use: Record) -> Saturation:
    is_rate = rule.is_metered
    parked = found.parked.get(room)
    return Saturation(
        of="limit",
        name=room.key,
        rule=rule,
        own=found.held[room],
        in_use=None if is_rate else found.held[room],
        maximum=rule.maximum,
        is_exact=True,
        waiting=0 if parked is None else parked.waiting,
        is_waiting_exact=found.is_whole,
        oldest_s=None if parked is None else parked.oldest_s,
        until=until_of(rule, use) if is_rate else None,
    )


def _name(room: RoomId, rule: Rule, declared: Collection[str], slugs: Mapping[int, str]) -> str:
    """Return what a room is called for operators: by keys that its limit names or flows declare, else patterns."""
    parts = [
        part
        if part in rule.key.split(PAIR) or part in declared or noun_of(part) in IMPLIED
        else f"{noun_of(part)}:*"
        for part in room.key.split(PAIR)
        if part
    ]
    org = [f"org:{slugs[room.org_id]}"] if room.org_id in slugs else []
    return PAIR.join([*org, *parts])


def _joined(keys: Sequence[Saturation]) -> Saturation:
    """Return the figures of keys behind one name: work is added up, of places those of the fullest are told."""
    if len(keys) == 1:
        return keys[0]
    fullest = max(keys, key=lambda one: (one.in_use or 0) / max(1, one.maximum or 1))
    return replace(
        fullest,
        own=sum(one.own for one in keys),
        waiting=sum(one.waiting for one in keys),
        oldest_s=max((one.oldest_s for one in keys if one.oldest_s is not None), default=None),
        until=max((one.until for one in keys if one.until is not None), default=None),
        keys=len(keys),
        full=FullShare(
            of_minute=_most(one.full.of_minute for one in keys),
            of_hour=_most(one.full.of_hour for one in keys),
        ),
    )


def _most(shares: Iterable[float | None]) -> float | None:
    return max((share for share in shares if share is not None), default=None)


async def orgs_of_all(con: Connection, after: str, limit: int) -> tuple[list[Saturation], bool]:
    """Return a page of the orgs that have work ready or being executed, by slug, and whether more follow."""
    rows: Sequence[Record] = await con.fetch(_SQL["orgs_in_line"], after, limit + 1, _MAX_OF_ORG)
    named = [("org", str(row["org_id"]), _org(row)) for row in rows[:limit]]
    return await with_fullness(con, named), len(rows) > limit


def _org(row: Record) -> Saturation:
    return Saturation(
        of="org",
        name=row["slug"],
        own=row["in_use"],
        in_use=row["in_use"],
        is_exact=True,
        waiting=row["waiting"],
        is_waiting_exact=row["waiting"] < _MAX_OF_ORG,
        oldest_s=row["oldest_s"],
        orgs=1,
    )


_READERS = {"queue": queues_of_all, "limit": limits_of_all, "org": orgs_of_all}
