"""Saturation: how full limits, queues and an org are, what waits for room there, and for how long.

Called by the API inside an org transaction, and by `saturation_of_all`. Invariants: it only reads, without the
claim's lock; looks and counts stop at caps, and say so; of a limit that orgs share, only what the org may see
of it is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.ceilings import held_by, list_limits, use_of
from millpond.engine.pacing import allowed, meter_us, next_at_us, repaced
from millpond.engine.queues import QueueView, list_queues
from millpond.engine.rules import RoomId, Rule, Rules
from millpond.types import NO_ORG

_SQL = queries("saturation")
MAX_SHOWN = 500
_MAX_LEASES = 10_000
_MAX_LANES = 5_000
_MAX_WAITING = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FullShare:
    """The share of the last minute and hour for which something was full, 0 to 1; None where nobody looked.

    An org is full while work of it stands under a full limit, a queue while work waits and no slot is free.
    """

    of_minute: float | None = None
    of_hour: float | None = None


NEVER_SEEN = FullShare()
MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Saturation:
    """How full one thing is: an org, a queue's slots, or what one limit lets go of a key.

    `in_use` of `maximum` places are taken, `own` of them by the org; without `is_exact` as a claim last saw it,
    or at least so many. `waiting` work items of the org are ready and have no room, at least so many without
    `is_waiting_exact`; the oldest has been ready for `oldest_s`. A rate has no places: it lets nothing go
    before `until`. `orgs` is of how many orgs the waiting work is, where all are counted; `keys` how many keys
    stand behind one name.
    """

    of: Literal["org", "queue", "limit"]
    name: str
    own: int
    is_exact: bool
    waiting: int
    is_waiting_exact: bool
    oldest_s: float | None
    in_use: int | None = None
    maximum: int | None = None
    rule: Rule | None = None
    until: datetime | None = None
    orgs: int | None = None
    keys: int = 1
    full: FullShare = NEVER_SEEN

    def is_starved(self, after_s: float) -> bool:
        """Whether the oldest work item that has no room here has been ready for longer than that."""
        return self.oldest_s is not None and self.oldest_s > after_s


async def saturation(con: Connection, org_id: int) -> tuple[list[Saturation], bool]:
    """Return how full an org, its queues and the limits are that its work meets; and whether more limits are met.

    First the org, then queues by name, then limits, those with most waiting first.
    """
    found = await list_queues(con, org_id)
    queues = await _queues(con, found)
    rooms, has_more = await _limits(con, org_id)
    named = [
        ("org", str(org_id), _org(await slug_of(con, org_id), found)),
        *(("queue", one.name, one) for one in queues),
        *(("room", room.text, one) for room, one in rooms),
    ]
    return await with_fullness(con, named), has_more


async def with_fullness(
    con: Connection, named: Sequence[tuple[str, str, Saturation]]
) -> list[Saturation]:
    """Return figures with the shares of time for which they were full; each comes with its kind and name there."""
    shares: list[dict[tuple[str, str], float]] = []
    for window_s in (MINUTE_S, HOUR_S):
        rows = await con.fetch(
            _SQL["fullness"],
            [kind for kind, _, _ in named],
            [name for _, name, _ in named],
            window_s,
        )
        shares.append(
            {
                (row["kind"], row["name"]): min(1.0, row["full_s"] / row["seen_s"])
                for row in rows
                if row["seen_s"] > 0
            }
        )
    return [
        replace(
            one,
            full=FullShare(
                of_minute=shares[0].get((kind, name)), of_hour=shares[1].get((kind, name))
            ),
        )
        for kind, name, one in named
    ]


def _org(slug: str, found: Sequence[QueueView]) -> Saturation:
    return Saturation(
        of="org",
        name=slug,
        own=sum(one.running for one in found),
        in_use=sum(one.running for one in found),
        is_exact=True,
        waiting=sum(one.queued for one in found),
        is_waiting_exact=all(one.is_depth_exact for one in found),
        oldest_s=max((one.oldest_s for one in found if one.oldest_s is not None), default=None),
    )


async def _queues(con: Connection, found: Sequence[QueueView]) -> list[Saturation]:
    """Return how many slots of live workers are in use, by all orgs; workers tell it once a second."""
    slots = await slots_of(con)
    return [
        Saturation(
            of="queue",
            name=one.name,
            own=one.running,
            in_use=slots[one.name]["in_use"] if one.name in slots else 0,
            maximum=slots[one.name]["slots"] if one.name in slots else 0,
            is_exact=False,
            waiting=one.queued,
            is_waiting_exact=one.is_depth_exact,
            oldest_s=one.oldest_s,
        )
        for one in found
    ]


async def slots_of(con: Connection) -> dict[str, Record]:
    """Return the slots of live workers by queue, and how many of them are in use."""
    return {row["queue"]: row for row in await con.fetch(_SQL["slots"])}


async def _limits(con: Connection, org_id: int) -> tuple[list[tuple[RoomId, Saturation]], bool]:
    rules = Rules.of(one.rule for one in await list_limits(con, org_id))
    if not rules:
        return [], False
    held, is_exact = await _held(con, org_id, rules)
    rows = await con.fetch(_SQL["parked"], org_id, _MAX_LANES, _MAX_WAITING)
    is_whole = rows[0]["looked_at"] < _MAX_LANES and rows[0]["counted"] < _MAX_WAITING
    parked = {RoomId.parse(row["room"]): row for row in rows if row["room"] is not None}
    order = sorted({*held, *parked}, key=lambda room: (-_waiting(parked, room), -held[room], room))
    use = await use_of(con, [room.text for room in order[:MAX_SHOWN]])
    slug = await slug_of(con, org_id)
    shown = [
        (
            room,
            _limit(
                room, rule, use[room.text], held[room], parked.get(room), (is_exact, is_whole), slug
            ),
        )
        for room in order[:MAX_SHOWN]
        if (rule := rules.rule_of(room)) is not None
    ]
    return shown, len(order) > MAX_SHOWN


def _waiting(parked: Mapping[RoomId, Record], room: RoomId) -> int:
    row = parked.get(room)
    return 0 if row is None else int(row["waiting"])


async def _held(con: Connection, org_id: int, rules: Rules) -> tuple[Counter[RoomId], bool]:
    """Return how much of an org's work under leases counts in which rooms, and whether all of it was looked at."""
    held: Counter[RoomId] = Counter()
    rows = await con.fetch(_SQL["held"], org_id, _MAX_LEASES)
    for row in rows:
        for room, _ in held_by(rules, org_id, row):
            held[room] += row["items"]
    return held, not rows or rows[0]["looked_at"] < _MAX_LEASES


def _limit(
    room: RoomId,
    rule: Rule,
    use: Record,
    own: int,
    parked: Record | None,
    is_exact: tuple[bool, bool],
    slug: str,
) -> Saturation:
    is_rate, is_shared = rule.is_metered, room.org_id == NO_ORG
    in_use = use["in_use"] if is_shared else own
    return Saturation(
        of="limit",
        name=room.key or f"org:{slug}",
        rule=rule,
        own=own,
        in_use=None if is_rate else max(own, in_use or 0),
        maximum=rule.maximum,
        is_exact=is_exact[0] and not is_shared,
        waiting=0 if parked is None else parked["waiting"],
        is_waiting_exact=is_exact[1],
        oldest_s=None if parked is None else parked["oldest_s"],
        until=until_of(rule, use) if is_rate else None,
    )


def until_of(rule: Rule, use: Record) -> datetime | None:
    """Return when a rate lets the next one go; None where it does now, or never will."""
    tat_us = use["tat_us"]
    if rule.is_of_tokens:
        tat_us = repaced(rule, tat_us, use["pace"], use["now_us"])
    if rule.maximum < 1 or allowed(rule, tat_us, use["now_us"]) > 0:
        return None
    ahead_us = meter_us(rule, tat_us, use["now_us"])
    return datetime.fromtimestamp(next_at_us(rule, ahead_us) / 1e6, UTC)


async def slug_of(con: Connection, org_id: int) -> str:
    """Return what an org is called."""
    slug: str = await con.fetchval(_SQL["slug"], org_id)
    return slug
