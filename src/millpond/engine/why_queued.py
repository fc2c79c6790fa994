"""Why a queued work item does not go: pauses, absent workers and full limits, else its place in line.

Called by `why` in its snapshot. Invariant: what stands queued always gets a reason.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.brakes import Brake
from millpond.engine.ceilings import Full, full_for
from millpond.engine.easing import at_us
from millpond.engine.lanes import ALONE
from millpond.engine.pauses import Pause, list_pauses
from millpond.engine.registry import capability
from millpond.types import INTERACTIVE, NO_ORG, STANDARD, Json, Urgency

_SQL = queries("why")
MAX_AHEAD = 1000
_MAX_WORKERS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One reason; `inner` has those of what it waits for, where that is a work item.

    `where` is the part of the text that names a worker's host and process.
    """

    kind: str
    text: str
    facts: Mapping[str, Json] = field(default_factory=dict)
    inner: Sequence[Reason] = ()
    where: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a work item stands queued; `flow` is None for a step in another queue."""

    item_id: uuid.UUID
    queue: str
    capability: str
    flow: str | None
    lane_id: int
    rank: int
    urgency: Urgency = STANDARD


def place_of_run(run: Record) -> Place:
    """Return where a queued run stands."""
    return Place(
        item_id=run["run_id"],
        queue=run["queue"],
        capability=able_of(capability(run["flow"], run["version"]), run["lane_id"]),
        flow=run["flow"],
        lane_id=run["lane_id"],
        rank=run["rank"],
        urgency=run["urgency"],
    )


def able_of(able: str, lane_id: int) -> str:
    """Name what a worker needs for work of a lane, which may be executed alone."""
    return able + ALONE if lane_id & 2 else able


async def queued(con: Connection, org_id: int, place: Place) -> list[Reason]:
    """Return what holds a queued work item: pauses, absent workers and full limits, else its place in line."""
    pauses = await list_pauses(con, org_id)
    held = [_paused(one) for one in pauses if one.holds(queue=place.queue, flow=place.flow)]
    workers = await con.fetch(_SQL["workers"], place.queue, place.capability)
    able = [
        row for row in workers if row["is_able"] and row["serves_queue"] and not row["draining"]
    ]
    if not able:
        held.append(_no_worker(place, workers))
    full = [_limited(one) for one in await full_for(con, org_id, place.lane_id)]
    if held:
        return [*held, *full]
    return [*full, await _in_line(con, org_id, place, able)]


def _paused(pause: Pause) -> Reason:
    scope = pause.scope
    what = (
        f"Queue {scope.queue}"
        if scope.queue
        else f"Flow {scope.flow}"
        if scope.flow
        else "All work"
    )
    by = "an operator, for everyone" if scope.is_for_everyone else pause.paused_by
    why = f" ({pause.reason})" if pause.reason else ""
    return Reason(
        kind="paused",
        text=f"{what} is paused by {by} since {at_text(pause.paused_at)}{why}.",
        facts={
            "scope": scope.kind,
            "queue": scope.queue or None,
            "flow": scope.flow or None,
            "paused_by": pause.shown_by,
            "reason": pause.reason,
            "paused_at": pause.paused_at,
        },
    )


def _limited(full: Full) -> Reason:
    """Tell of a limit without room: how much of it is in use, or from when on there is some."""
    rule = full.rule
    of = "everybody's" if full.is_shared else "the organization's"
    if rule.brake is not None:
        return _braked(full, rule.brake)
    if rule.kind == "rate":
        until = f" until {at_text(full.until)}" if full.until else ""
        text = f"No more starts on {rule.key}{until}: {rule.maximum} in {rule.period_s:g} s are allowed"
    else:
        known = "" if full.in_use is None else f"{full.in_use} of "
        text = f"{rule.key} has no room: {known}{rule.maximum} places are in use by {of} work"
    return Reason(
        kind="limit",
        text=f"{text}.",
        facts={
            "key": rule.key,
            "limit": rule.kind,
            "set_by": "platform" if rule.owner == NO_ORG else "org",
            "is_shared": full.is_shared,
            "in_use": full.in_use,
            "maximum": rule.maximum,
            "period_s": rule.period_s,
            "until": full.until,
            "is_exact": full.is_exact,
            "holders": list(full.holders),
        },
    )


def _braked(full: Full, brake: Brake) -> Reason:
    """Tell of a key that cools down or recovers, or whose breaker is open."""
    opened_at = at_us(brake.opened_us) if brake.opened_us else None
    if opened_at is not None:
        next_up = (
            f"next probe at {at_text(full.until)}" if full.until else "one run at a time probes it"
        )
        text = f"The breaker of {brake.key} is open since {at_text(opened_at)}, {next_up}"
    elif full.until is not None:
        text = f"{brake.key} is cooling down until {at_text(full.until)}"
    else:
        text = f"{brake.key} recovers from a cooldown: {full.rule.maximum} at once may go by now"
    return Reason(
        kind="cooldown" if opened_at is None else "breaker",
        text=f"{text} ({brake.reason}).",
        facts={
            "key": brake.key,
            "is_of_platform": brake.owner == NO_ORG,
            "until": full.until,
            "opened_at": opened_at,
            "in_use": full.in_use,
            "maximum": full.rule.maximum,
            "hits": brake.hits,
            "step": brake.step,
            "reason": brake.reason,
            "holders": list(full.holders),
        },
    )


def _no_worker(place: Place, workers: Sequence[Record]) -> Reason:
    """Name what is missing: workers at all, of this queue, or with this code."""
    serving = [row for row in workers if row["serves_queue"] and not row["draining"]]
    if not workers:
        text = "No worker is live."
    elif not serving:
        text = f"No live worker serves queue {place.queue}."
    else:
        text = f"No live worker of queue {place.queue} has {place.capability}."
    return Reason(
        kind="no_worker",
        text=text,
        facts={
            "queue": place.queue,
            "capability": place.capability,
            "workers": [
                {
                    "id": row["worker_id"],
                    "host": row["host"],
                    "pid": row["pid"],
                    "serves_queue": row["serves_queue"],
                    "is_able": row["is_able"],
                    "is_draining": row["draining"],
                }
                for row in workers[:_MAX_WORKERS]
            ],
        },
    )


async def _in_line(con: Connection, org_id: int, place: Place, able: Sequence[Record]) -> Reason:
    ahead = await con.fetchval(
        _SQL["ahead"], org_id, place.lane_id, place.rank, place.item_id, MAX_AHEAD + 1
    )
    is_exact = ahead <= MAX_AHEAD
    slots, in_use = sum(row["slots"] for row in able), sum(row["in_use"] for row in able)
    shown = f"{ahead}" if is_exact else f"more than {MAX_AHEAD}"
    use = f"{in_use} of {slots} slots are in use" if slots else "only idle slots of others help it"
    of = " of interactive work" if place.urgency == INTERACTIVE else ""
    return Reason(
        kind="in_line",
        text=f"It stands in line{of} in queue {place.queue} with {shown} before it in its lane; {use}.",
        facts={
            "queue": place.queue,
            "urgency": place.urgency,
            "ahead": min(ahead, MAX_AHEAD),
            "is_exact": is_exact,
            "slots": slots,
            "in_use": in_use,
        },
    )


def at_text(at: datetime | None) -> str:
    """Return a time as reasons tell it."""
    return "an unknown time" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
