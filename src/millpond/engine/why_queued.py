"""Why a queued work item does not go: pauses, absent workers and full limits, else its place in line.

Called by `why` in its snapshot. Invariant: what stands queued always gets a reason.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.brakes import Brake
from millpond.engine.ceilings import MAX_TURN, Full, full_for
from millpond.engine.easing import at_us
from millpond.engine.estimates import FIRST_GUESS_S
from millpond.engine.lanes import ALONE
from millpond.engine.ordering import (
    Estimate,
    Line,
    Pace,
    Position,
    Slots,
    all_of,
    next_room_s,
    position,
    start_in_line,
)
from millpond.engine.pauses import Pause, list_pauses
from millpond.engine.registry import capability
from millpond.types import INTERACTIVE, NO_ORG, STANDARD, Json, Urgency

_SQL = queries("why")
MAX_AHEAD = 1000
_MAX_WORKERS = 20
# What a queue let go is looked at for so long.
_PACE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One reason; `inner` has those of what it waits for, where that is a work item.

    `where` is the part of the text that names a worker's host and process; `estimate` is of when it holds no more.
    """

    kind: str
    text: str
    facts: Mapping[str, Json] = field(default_factory=dict)
    inner: Sequence[Reason] = ()
    where: str = ""
    estimate: Estimate | None = None


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


async def limited(
    con: Connection, org_id: int, lane_id: int, step_keys: Sequence[str]
) -> list[Reason]:
    """Return what a step waits for that has no room beside its run, which is under way."""
    return [_limited(one) for one in await full_for(con, org_id, lane_id, step_keys)]


async def queued(con: Connection, org_id: int, place: Place) -> list[Reason]:
    """Return what holds a queued work item: pauses, absent workers and full limits, else its place in line."""
    pauses = await list_pauses(con, org_id)
    held = [_paused(one) for one in pauses if one.holds(queue=place.queue, flow=place.flow)]
    workers = await con.fetch(_SQL["workers"], place.queue, place.capability)
    serving = [row for row in workers if row["serves_queue"] and not row["draining"]]
    able = [row for row in serving if row["is_able"]]
    if not able:
        held.append(_no_worker(place, workers, serving))
    full = await full_for(con, org_id, place.lane_id)
    reasons = [_limited(one) for one in full]
    if held:
        return [*held, *reasons]
    return [*reasons, await _in_line(con, org_id, place, serving, full)]


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
        estimate=Estimate(in_s=None, basis="paused", text="until when it is paused nobody knows"),
    )


def _limited(full: Full) -> Reason:
    """Tell of a limit without room: how much of it is in use, or from when on there is some."""
    rule = full.rule
    of = "everybody's" if full.is_shared else "the organization's"
    if rule.brake is not None:
        return _braked(full, rule.brake)
    if rule.is_of_tokens:
        text = _of_tokens(full)
    elif rule.kind == "rate":
        until = f" until {at_text(full.until)}" if full.until else ""
        text = f"No more starts on {rule.key}{until}: {rule.maximum} in {rule.period_s:g} s are allowed"
    elif not full.is_sure:
        text = (
            f"{rule.key} may have no room, or give it to others first: "
            f"how many of its {rule.maximum} places are in use is not known"
        )
    else:
        known = "" if full.in_use is None else f"{full.in_use} of "
        text = f"{rule.key} has no room: {known}{rule.maximum} places are in use by {of} work"
    if full.turn is not None:
        count = f"up to {full.turn}" if full.turn < MAX_TURN else f"{MAX_TURN} or more"
        text += f"; places go in turn there, {count} organizations that have used less go before"
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
            **({} if full.turn is None else {"turn": full.turn}),
            **({"tokens": full.need, "left": full.left} if rule.is_of_tokens else {}),
        },
    )


def _of_tokens(full: Full) -> str:
    """Tell how many tokens are left, and when there are enough."""
    rule = full.rule
    allowed = f"{rule.maximum:,} in {rule.period_s:g} s are allowed, {rule.at_once:,} at once"
    if full.need is not None and full.need > rule.at_once:
        return (
            f"{rule.key} never has the {full.need:,} tokens that it needs: {allowed}; "
            "raise the limit or cancel the run"
        )
    left = "" if full.left is None else f", {max(0, full.left):,} left"
    owed = f" ({-full.left:,} owed)" if full.left is not None and full.left < 0 else ""
    until = f", the next at {at_text(full.until)}" if full.until else ""
    needs = "tokens" if full.need is None else f"tokens: needs {full.need:,}"
    return f"{rule.key} has too few {needs}{left}{owed}{until}; {allowed}"


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


def _no_worker(place: Place, workers: Sequence[Record], serving: Sequence[Record]) -> Reason:
    """Name what is missing: workers at all, of this queue, or with this code."""
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
        estimate=Estimate(in_s=None, basis="no_worker", text="no worker could take it"),
    )


async def _in_line(
    con: Connection,
    org_id: int,
    place: Place,
    serving: Sequence[Record],
    full: Sequence[Full],
) -> Reason:
    """Tell of the place in line of what only waits for a slot, or for room too."""
    ahead = await con.fetchval(
        _SQL["ahead"], org_id, place.lane_id, place.rank, place.item_id, MAX_AHEAD + 1
    )
    costs = _costs(serving)
    stands = await _position(con, place, costs)
    able = [row for row in serving if row["is_able"]]
    slots, in_use = sum(row["slots"] for row in able), sum(row["in_use"] for row in able)
    pace = await con.fetchrow(_SQL["pace"], place.queue, _PACE_S)
    assert pace is not None
    own_s = costs.get(place.capability) or FIRST_GUESS_S
    conditions = [
        start_in_line(
            stands,
            Slots(total=slots, in_use=in_use, cost_s=own_s),
            Pace(went=pace["went"], seen_s=pace["full_s"]),
        ),
        *(_room_comes(one, costs, own_s, ahead, pace["now_at"]) for one in full),
    ]
    use = f"{in_use} of {slots} slots are in use" if slots else "only idle slots of others help it"
    of = " of interactive work" if place.urgency == INTERACTIVE else ""
    order = f"{stands.of_all}" if stands.is_exact else f"at least {stands.of_all}"
    return Reason(
        kind="in_line",
        text=f"It stands in line{of} in queue {place.queue} with {_many(ahead)} before it in its lane, "
        f"{_many(stands.of_org)} in its organization's line and {order} in the fair order; {use}.",
        facts={
            "queue": place.queue,
            "urgency": place.urgency,
            "ahead": min(ahead, MAX_AHEAD),
            "is_exact": ahead <= MAX_AHEAD,
            "ahead_of_org": min(stands.of_org, MAX_AHEAD),
            "ahead_of_all": stands.of_all,
            "is_order_exact": stands.is_exact,
            "slots": slots,
            "in_use": in_use,
        },
        estimate=all_of(conditions),
    )


def _many(count: int) -> str:
    return f"{count}" if count <= MAX_AHEAD else f"more than {MAX_AHEAD}"


def _costs(serving: Sequence[Record]) -> dict[str, float | None]:
    """Return how long work of each capability takes, in worker-seconds, None where no worker tells."""
    told: dict[str, list[float]] = {}
    for row in serving:
        took_s = orjson.loads(row["took_s"] or "{}")
        for able in row["capabilities"]:
            told.setdefault(able, []).extend([took_s[able]] if able in took_s else [])
    return {able: sum(took) / len(took) if took else None for able, took in told.items()}


async def _position(con: Connection, place: Place, costs: Mapping[str, float | None]) -> Position:
    rows = await con.fetch(
        _SQL["line"],
        *(place.queue, place.lane_id, place.rank, place.item_id),
        list(costs),
        [cost_s or FIRST_GUESS_S for cost_s in costs.values()],
        MAX_AHEAD,
    )
    # A row without items says that more may stand before it than was looked for.
    own, *others = [Line(**row) for row in rows if row["ahead"] is not None]
    return position(own, others, MAX_AHEAD, is_cut=any(row["ahead"] is None for row in rows))


def _room_comes(
    full: Full, costs: Mapping[str, float | None], own_s: float, ahead: int, now: datetime
) -> Estimate:
    """Estimate when a limit has room for a work item that so many of its lane go before."""
    rule = full.rule
    if full.until is not None:
        in_s = max(0.0, (full.until - now).total_seconds())
        if rule.is_metered:
            in_s += rule.cost_us(ahead * (full.need or 1)) / 1e6
        text = f"{rule.key} lets nothing go before {at_text(full.until)}"
        return Estimate(in_s=in_s, basis="limit", text=text, is_least=True)
    unknown = f"when {rule.key} has room is not known"
    if rule.kind != "concurrency" or full.is_shared or not full.held:
        return Estimate(in_s=None, basis="full", text=unknown)
    rests_s = [_rest_s(costs.get(able), age_s) for able, age_s in full.held]
    in_s = next_room_s(rests_s, rule.maximum, ahead, own_s)
    if not isfinite(in_s):
        return Estimate(in_s=None, basis="full", text=unknown)
    text = f"{rule.key} has {rule.maximum} places, held by work that takes about as long as workers tell"
    return Estimate(in_s=in_s, basis="limit", text=text, is_least=True)


def _rest_s(cost_s: float | None, age_s: float) -> float | None:
    """Return how long work has still to go; None where that is not told, or it is at it for longer than it takes."""
    return None if cost_s is None or age_s > cost_s else cost_s - age_s


def at_text(at: datetime | None) -> str:
    """Return a time as reasons tell it."""
    return "an unknown time" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
