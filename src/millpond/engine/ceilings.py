"""Ceilings: limits as people set them, and how full they are for whoever asks why a run waits.

Called by the API in a transaction of the caller, by `declaring`, and by `why` in a snapshot; the caller commits, then
hints the queues. Invariants: an org sets limits on its own work only; of the platform's, what an operator set stands
above what is declared; a change is read by the next claim; reading takes no lock.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Literal

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.easing import at_us, list_brakes
from millpond.engine.keying import PAIR, parse_key
from millpond.engine.lanes import ALONE
from millpond.engine.needs import APART, needed, of_step, parted
from millpond.engine.pacing import allowed, meter_us, next_at_us, repaced
from millpond.engine.rules import MAX_SPAN_S, Kind, Place, RoomId, Rule, Rules
from millpond.engine.tokens import need_of
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.types import NO_ORG

_SQL = queries("ceilings")
MAX_LIMITS = 1000
MAX_HOLDERS = 20
# So many orgs are counted that go before in rooms that several queues need.
MAX_TURN = 1000
Source = Literal["api", "settings", "code"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overridden:
    """What settings or code declare, and another limit of the same key and kind stands above."""

    source: Source
    set_by: str
    rule: Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A limit with who set it and where; `owner` is 0 for the platform's.

    `overrides` are what it stands above, what goes first there first; told to operators only.
    """

    rule: Rule
    set_by: str
    set_at: datetime
    source: Source = "api"
    overrides: Sequence[Overridden] = ()

    @property
    def is_of_platform(self) -> bool:
        """Whether an operator set it, for all orgs or for each."""
        return self.rule.owner == NO_ORG


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """A limit without room for a work item: `in_use` of `maximum`, or (a rate, a brake) none before `until`.

    Of tokens it has `left`, and the work item needs so many (`need`, None where it declares nothing): without `until`
    it needs more than there ever are at once.

    `holders` are runs of the asking org that hold places there, the oldest first. `is_shared`: other orgs count
    there too. Not `is_exact`: as the claim saw it when it last parked work there. `held` is the org's work that
    has places there: of which capability each is, and since how many seconds workers have it. Where several queues need
    the room, so many orgs go before at most (`turn`), since they have used it less. Where not `is_sure`, it or another
    of those told of has no room, or gives it to others first.
    """

    rule: Rule
    is_shared: bool
    in_use: int | None = None
    until: datetime | None = None
    holders: Sequence[uuid.UUID] = ()
    is_exact: bool = True
    held: Sequence[tuple[str, float]] = ()
    need: int | None = None
    left: int | None = None
    turn: int | None = None
    is_sure: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    work: dict[RoomId, list[tuple[str, float]]] = field(default_factory=dict)
    holders: dict[RoomId, list[uuid.UUID]] = field(default_factory=dict)


async def list_limits(con: Connection, org_id: int) -> list[Limit]:
    """Return what limits an org: what it set itself, then what the platform set, by key."""
    own = await con.fetch(_SQL["own"], org_id)
    shared = await con.fetch(_SQL["platform"], org_id)
    return [*(_limit(row, org_id) for row in own), *(_limit(row, NO_ORG) for row in shared)]


async def list_platform_limits(con: Connection) -> list[Limit]:
    """Return what the platform limits, by key, with what each stands above."""
    below: dict[tuple[str, str], list[Overridden]] = {}
    for row in await con.fetch(_SQL["declared"]):
        one = Overridden(source=row["source"], set_by=row["set_by"], rule=_rule(row, NO_ORG))
        below.setdefault((row["key"], row["kind"]), []).append(one)
    found = []
    for row in await con.fetch(_SQL["platform"], None):
        declared = below.get((row["key"], row["kind"]), [])
        found.append(_limit(row, NO_ORG, declared if row["source"] == "api" else declared[1:]))
    return found


async def set_limit(con: Connection, org_id: int, rule: Rule, subject: str) -> Limit:
    """Set a limit of an org, or with `NO_ORG` of the platform; raises InvalidInput, NotFound, Conflict.

    An org names itself by its slug, or only what of its work it limits.
    """
    rule = check_rule(rule)
    values = (rule.key, rule.kind, rule.maximum, rule.period_s, rule.burst, subject)
    if org_id == NO_ORG:
        of_org = await named_org(con, rule.key)
        await lock_platform(con)
        await con.execute(_SQL["put_platform"], *values, of_org)
    else:
        await _check_own(con, org_id, rule)
        await con.execute(_SQL["put_own"], org_id, *values)
    await con.execute(_SQL["changed"], org_id, rule.key, rule.kind)
    found = await (list_platform_limits(con) if org_id == NO_ORG else list_limits(con, org_id))
    return next(
        one
        for one in found
        if (one.rule.owner, one.rule.key, one.rule.kind) == (org_id, rule.key, rule.kind)
    )


async def remove_limit(con: Connection, org_id: int, key: str, kind: Kind) -> str:
    """Remove a limit of an org, or with `NO_ORG` of the platform; returns its key, raises NotFound.

    What stood below one of the platform holds then. One that is declared goes until somebody starts who declares it.
    """
    key = parse_key(key, is_old=True)
    if org_id == NO_ORG:
        await lock_platform(con)
        gone = await con.fetchval(_SQL["remove_platform"], key, kind)
        await con.execute(_SQL["forget"], key, kind, gone)
        await settle(con, [(key, kind)])
    else:
        gone = await con.fetchval(_SQL["remove_own"], org_id, key, kind)
    if gone is None:
        raise NotFound(
            f"there is no {kind} limit on {key}",
            code="limit_not_found",
            param="key",
            advice="list the limits for what there is, and give key and kind as they stand there",
        )
    await con.execute(_SQL["changed"], org_id, key, kind)
    return key


async def lock_platform(con: Connection) -> None:
    """Wait until nobody else changes what the platform limits, before anything of it is read or written."""
    await con.execute(_SQL["lock_platform"])


async def settle(con: Connection, changed: Sequence[tuple[str, str]]) -> None:
    """Let what is declared for these keys and kinds hold, unless an operator set a limit; under the lock."""
    await con.fetch(_SQL["settle"], [key for key, _ in changed], [kind for _, kind in changed])


async def full_for(
    con: Connection, org_id: int, lane_id: int, step_keys: Sequence[str] = ()
) -> list[Full]:
    """Return the limits without room for work of a lane; empty where none is in the way.

    A lane that is parked under a limit that has room by now, or keeps it for another, is told of with that one. With
    `step_keys` those without room for a try of a step with these keys, of a run of the lane that is under way.
    """
    lane = await con.fetchrow(_SQL["lane"], org_id, lane_id)
    if lane is None:
        return []
    rules = Rules.of(one.rule for one in await list_limits(con, org_id))
    for one in await list_brakes(con):
        rules.brake(one.brake.owner, one.brake.key, one.brake)
    places, need_in = _places(rules, org_id, lane), _needs(rules, org_id, lane)
    if step_keys:
        able = lane["capability"].rstrip(ALONE)
        places = needed(rules, org_id, lane["queue"], able, lane["keys"], step_keys)
        need_in = partial(_same, need_of(step_keys))
    if not places:
        return []
    use = await use_of(con, [one.room.text for one in places])
    held = await _held(con, org_id, rules)
    now_us = use[places[0].room.text]["now_us"]
    places = tuple(Place(room, rules.rule_at(room, rule, now_us)) for room, rule in places)
    found = [_full(place, use[place.room.text], held, need_in(place.room)) for place in places]
    full = [(place, one) for place, one in zip(places, found, strict=True) if one is not None]
    if not full and not step_keys and lane["parked_on"] is not None:
        parked_on = RoomId.parse(lane["parked_on"])
        parked = [place for place in places if place.room == parked_on]
        full = [(place, _parked(place, use[place.room.text], held)) for place in parked]
    if not full and step_keys:
        # It was refused by some; of rooms under which no lane stands it is not known how many are in use.
        full = [
            (place, replace(_parked(place, use[place.room.text], held), is_sure=False))
            for place in places
            if place.room.org_id == NO_ORG
            and not place.rule.is_metered
            and use[place.room.text]["in_use"] is None
        ]
    shared = [place.room.text for place, one in full if one.is_shared]
    rows = await con.fetch(_SQL["turns"], shared, MAX_TURN) if shared else ()
    turns = {row["room"]: row["orgs"] for row in rows}
    return [replace(one, turn=turns.get(place.room.text)) for place, one in full]


def _same(need: int | None, _room: RoomId) -> int | None:
    return need


async def use_of(con: Connection, rooms: Sequence[str]) -> dict[str, Record]:
    """Return how full rooms were as the claim last parked work there, and how far their rates are used, by name."""
    return {row["room"]: row for row in await con.fetch(_SQL["use"], rooms)}


def _short_of(place: Place, row: Record, need: int | None) -> Full | None:
    """Tell of a limit on tokens that has fewer than a work item needs; without a need of its own, fewer than one."""
    room, rule = place
    now_us = row["now_us"]
    tat_us = repaced(rule, row["tat_us"], row["pace"], now_us)
    left, count = allowed(rule, tat_us, now_us), need or 1
    if left >= count and rule.maximum > 0:
        return None
    until = None
    if rule.maximum > 0 and count <= rule.at_once:
        until = at_us(next_at_us(rule, meter_us(rule, tat_us, now_us), count))
    return Full(rule=rule, is_shared=room.org_id == NO_ORG, until=until, need=need, left=left)


def _full(place: Place, row: Record, held: _Held, need: int | None) -> Full | None:
    room, rule = place
    holders = held.holders.get(room, ())
    is_shared = room.org_id == NO_ORG
    if rule.brake is not None and rule.maximum < 1:
        return Full(rule=rule, is_shared=is_shared, until=at_us(rule.brake.until_us))
    if rule.is_of_tokens:
        return _short_of(place, row, need)
    if rule.kind == "rate":
        if allowed(rule, row["tat_us"], row["now_us"]) > 0:
            return None
        until = None
        if rule.maximum > 0:
            ahead_us = meter_us(rule, row["tat_us"], row["now_us"])
            until = at_us(next_at_us(rule, ahead_us))
        return Full(rule=rule, is_shared=is_shared, until=until)
    work = held.work.get(room, ())
    in_use = row["in_use"] if is_shared else len(work)
    if rule.maximum < 1:
        in_use = in_use or 0
    if in_use is None or in_use < rule.maximum:
        return None
    return Full(
        rule=rule,
        is_shared=is_shared,
        in_use=in_use,
        holders=holders,
        is_exact=not is_shared,
        held=work,
    )


def _parked(place: Place, row: Record, held: _Held) -> Full:
    room, rule = place
    return Full(
        rule=rule,
        is_shared=room.org_id == NO_ORG,
        in_use=None if rule.is_metered else row["in_use"],
        holders=held.holders.get(room, ()),
        is_exact=False,
    )


async def _held(con: Connection, org_id: int, rules: Rules) -> _Held:
    held = _Held()
    for row in await con.fetch(_SQL["holders"], org_id):
        for room, _ in held_by(rules, org_id, row):
            held.work.setdefault(room, []).append((row["capability"], row["age_s"]))
            runs = held.holders.setdefault(room, [])
            if len(runs) < MAX_HOLDERS and row["run_id"] not in runs:
                runs.append(row["run_id"])
    return held


def held_by(rules: Rules, org_id: int, row: Record) -> tuple[Place, ...]:
    """Return the rooms in which a lease, or the try of a step under one, has a place."""
    if APART in row["keys"]:
        run_keys, step_keys = parted(row["keys"])
        able = row["capability"].rstrip(ALONE)
        return needed(rules, org_id, row["queue"], able, run_keys, step_keys)
    return _places(rules, org_id, row)


def _places(rules: Rules, org_id: int, row: Record) -> tuple[Place, ...]:
    able = row["capability"].rstrip(ALONE)
    return rules.places(org_id, row["queue"], able, row["keys"])


def _needs(rules: Rules, org_id: int, lane: Record) -> Callable[[RoomId], int | None]:
    """Return what tells how many tokens a lane's items declare to need in a room: a run's, or its step's in line."""
    run_keys, step_keys = parted(lane["keys"])
    able = lane["capability"].rstrip(ALONE)
    places = of_step(rules, org_id, lane["queue"], able, lane["keys"])
    rooms = {place.room for place in places}
    return lambda room: need_of(step_keys if room in rooms else run_keys)


def check_rule(rule: Rule) -> Rule:
    """Return a limit with its key in its one way of writing; raises InvalidInput for what does not fit."""
    is_rate = rule.is_metered
    if is_rate and rule.period_s is None:
        raise InvalidInput(
            f"a limit of kind {rule.kind} is so many (maximum) per period, and period_s is missing",
            param="period_s",
            advice="give period_s, in seconds, such as 60",
        )
    if not is_rate:
        for name in ("period_s", "burst"):
            if getattr(rule, name) is not None:
                raise InvalidInput(
                    f"a limit of kind {rule.kind} has no {name}: maximum is how much goes on at once",
                    param=name,
                    advice=f"leave {name} out, or take the kind rate or tokens",
                )
    most_s = 1e7 if rule.is_of_tokens else 1e5
    if is_rate and rule.maximum / (rule.period_s or 1) > most_s:
        raise InvalidInput(
            f"maximum {rule.maximum:,} in {rule.period_s:g} s is too much for kind {rule.kind}: "
            f"at most {most_s:,.0f} in a second",
            param="maximum",
            advice="take a smaller maximum or a longer period_s",
        )
    # Of tokens as many as a period brings: a burst of one would let nothing go.
    burst = (rule.burst or max(1, rule.maximum if rule.is_of_tokens else 1)) if is_rate else None
    if burst is not None and burst * (rule.period_s or 1) / max(1, rule.maximum) > MAX_SPAN_S:
        raise InvalidInput(
            f"burst {burst:,} is not earned again within 366 days: "
            "burst × period_s / maximum is at most 31,622,400 seconds",
            param="burst",
            advice="take a smaller burst, a shorter period or a higher maximum",
        )
    return Rule(
        owner=rule.owner,
        key=parse_key(rule.key),
        kind=rule.kind,
        maximum=rule.maximum,
        period_s=rule.period_s,
        burst=burst,
    )


async def _check_own(con: Connection, org_id: int, rule: Rule) -> None:
    org, _, rest = rule.key.partition(PAIR)
    if org.startswith("org:"):
        slug = await con.fetchval(_SQL["slug"], org_id)
        if rest or org != f"org:{slug}":
            raise InvalidInput(
                "an organization limits its own work: name itself alone, or what of its work",
                code="limit_not_own",
                param="key",
                advice=f"write org:{slug} for all of it, or leave the org out",
            )
    others = [
        row
        for row in await con.fetch(_SQL["own"], org_id)
        if (row["key"], row["kind"]) != (rule.key, rule.kind)
    ]
    if len(others) >= MAX_LIMITS:
        raise Conflict(f"an organization has {MAX_LIMITS} limits at most", code="too_many_limits")


async def named_org(con: Connection, key: str) -> int | None:
    """Return the org that a key names exactly; raises NotFound for a slug that nobody has."""
    org = key.split(PAIR)[0]
    if not org.startswith("org:") or org == "org:*":
        return None
    found: int | None = await con.fetchval(_SQL["org_named"], org.removeprefix("org:"))
    if found is None:
        raise NotFound(f"there is no organization {org}", code="org_not_found", param="key")
    return found


def _limit(row: Record, owner: int, overrides: Sequence[Overridden] = ()) -> Limit:
    return Limit(
        rule=_rule(row, owner),
        set_by=row["set_by"],
        set_at=row["set_at"],
        source=row["source"],
        overrides=overrides,
    )


def _rule(row: Record, owner: int) -> Rule:
    return Rule(
        owner=owner,
        key=row["key"],
        kind=row["kind"],
        maximum=row["maximum"],
        period_s=row["period_s"],
        burst=row["burst"],
        of_org=row["of_org"],
    )
