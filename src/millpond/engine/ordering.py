"""Ordering: how many work items go before one in its queue, and when it can be expected to start. Pure.

Called by `why_queued` with a snapshot of the lines. Invariants: who goes before whom is what `admission`
decides where nothing arrives and no limit stands in the way, however many slots come free at a time; what cannot
be known is no estimate but a reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Literal

from millpond.engine.estimates import TURN_S

Basis = Literal[
    "free_slot",
    "pace",
    "slots",
    "limit",
    "timer",
    "running",
    "paused",
    "no_worker",
    "full",
    "human",
    "signal",
    "child",
    "blocked",
    "unknown",
]
# A pace that was seen for less time tells nothing.
LEAST_SEEN_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An org's place in a queue's fair order, and what its first work items cost, in order, in worker-seconds.

    `goes_first`: at the same virtual time it goes before the org that asks.
    """

    weight: float
    virtual_s: float
    ahead: Sequence[float]
    goes_first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How many work items go before one: of its org's line, and of all; `work_s` is what these cost, in worker-seconds.

    The count of all stops at a cap, and does without those that may go before it or after; without `is_exact` it is
    the least.
    """

    of_org: int
    of_all: int
    is_exact: bool
    work_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How many work items a queue let go in so many seconds in which more waited than it had slots for."""

    went: int
    seen_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Slots of the workers that could take a work item, how many are in use, and what one item there costs."""

    total: int
    in_use: int
    cost_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """In how many seconds something starts or goes on, None where that is not known; `text` says on what basis.

    `is_least`: not before that, and perhaps later.
    """

    in_s: float | None
    basis: Basis
    text: str
    is_least: bool = False


def position(own: Line, others: Sequence[Line], most: int, *, is_cut: bool = False) -> Position:
    """Return where the work item stands behind what is `ahead` of it in its org's own line; counts to `most`.

    `is_cut`: there may be others that are not told of.
    Start-time fair queueing: an org's items start one after the other at its virtual time, each later by what
    the one before costs over the weight; of all items the one goes next that starts first. A claim for many slots lets
    small items of an org go in one turn: those that may stand on either side of the item are not counted.
    """
    start_s = own.virtual_s
    starts = [start_s, *(start_s := start_s + cost_s / own.weight for cost_s in own.ahead)]
    first_s = _turn_s(starts, own.weight)
    before, work_s, is_exact = len(own.ahead), sum(own.ahead), not is_cut
    for line in others:
        at_s = line.virtual_s
        passed = [at_s]
        for cost_s in line.ahead:
            if at_s > first_s or (at_s == first_s and not line.goes_first):
                # Whether this one goes before is left to turns where that of one of the two begins so early.
                turn_s = _turn_s(passed, line.weight, cost_s)
                if turn_s < start_s or (turn_s == start_s and line.goes_first):
                    is_exact = False
                break
            before, work_s = before + 1, work_s + cost_s
            at_s += cost_s / line.weight
            passed.append(at_s)
    return Position(
        of_org=len(own.ahead),
        of_all=min(before, most),
        is_exact=before <= most and is_exact,
        work_s=work_s,
    )


def _turn_s(starts: Sequence[float], weight: float, cost_s: float = 0.0) -> float:
    """Return when the turn begins at the earliest in which the last of an org's items goes, which costs so much."""
    # A little earlier, since sums of the same costs can differ in their last digits.
    least_s = starts[-1] + (cost_s - TURN_S) / weight - 1e-9 * max(1.0, abs(starts[-1]))
    turn_s = starts[-1]
    for start_s in reversed(starts):
        if start_s < least_s:
            break
        turn_s = start_s
    return turn_s


def start_in_line(place: Position, slots: Slots, pace: Pace | None) -> Estimate:
    """Estimate when a work item gets a slot: at once, by what its queue let go lately, or by what others cost."""
    before = f"{place.of_all} before it" if place.is_exact else f"at least {place.of_all} before it"
    if place.of_all < slots.total - slots.in_use:
        return Estimate(in_s=0.0, basis="free_slot", text=f"{before}, and a slot is free")
    many = f"{before}, {slots.total} slot{'' if slots.total == 1 else 's'}"
    if pace is not None and pace.seen_s >= LEAST_SEEN_S:
        if not pace.went:
            return Estimate(
                in_s=None,
                basis="pace",
                text=f"{many}, and for {pace.seen_s:.0f} s none of them came free",
            )
        per_s = pace.went / pace.seen_s
        return Estimate(
            in_s=(place.of_all + 1) / per_s,
            basis="pace",
            text=f"{many}, {per_s:.2g} a second over the last minute",
            is_least=not place.is_exact,
        )
    if not slots.total:
        return Estimate(
            in_s=None, basis="unknown", text=f"{before}, and only idle slots of other queues help"
        )
    # What is being executed is half done, one with the other.
    in_s = (place.work_s + min(slots.in_use, slots.total) * slots.cost_s / 2) / slots.total
    return Estimate(
        in_s=in_s,
        basis="slots",
        text=f"{many}, {slots.cost_s:.2g} s for each as workers tell",
        is_least=not place.is_exact,
    )


def next_room_s(rests_s: Sequence[float | None], maximum: int, ahead: int, cost_s: float) -> float:
    """Return in how many seconds a limit has a place for a work item that `ahead` others go before; inf: not known.

    `rests_s` is how long each of those that hold places still has, None where nobody knows.
    """
    ends = sorted(inf if rest is None else max(0.0, rest) for rest in rests_s)
    over = len(ends) - maximum
    if maximum < 1 or over >= len(ends):
        return inf
    at_s = 0.0
    for _ in range(over):
        at_s = heapq.heappop(ends)  # a limit that was lowered: these ends make no place
    for _ in range(max(0, -over)):
        heapq.heappush(ends, 0.0)
    for _ in range(ahead):
        at_s = max(at_s, heapq.heappop(ends))
        heapq.heappush(ends, at_s + cost_s)
    return max(at_s, heapq.heappop(ends))


def all_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return when the last of several conditions is met that have to be met together; the first unknown one decides."""
    unknown = next((one for one in estimates if one.in_s is None), None)
    if unknown is not None:
        return unknown
    last = max(estimates, key=lambda one: one.in_s or 0.0)
    if len(estimates) == 1:
        return last
    is_least = any(one.is_least for one in estimates)
    return replace(last, text="; ".join(one.text for one in estimates), is_least=is_least)


def any_of(estimates: Sequence[Estimate]) -> Estimate | None:
    """Return when the first of several conditions is met, any of which is enough; None without any."""
    known = [one for one in estimates if one.in_s is not None]
    if not known:
        return estimates[0] if estimates else None
    first = min(known, key=lambda one: one.in_s or 0.0)
    if len(known) == len(estimates):
        return first
    text = f"{first.text}, or as soon as something else comes that it waits for"
    return replace(first, text=text, is_least=False)


def shown(estimate: Estimate) -> str:
    """Return an estimate as a sentence tells it."""
    if estimate.in_s is None or not isfinite(estimate.in_s):
        return f"When is not known: {estimate.text}."
    when = "now" if estimate.in_s < 1 else f"in about {in_words(estimate.in_s)}"
    least = " at the earliest" if estimate.is_least else ""
    return f"Expected {when}{least}: {estimate.text}."


def in_words(seconds: float) -> str:
    """Return a stretch of time, no finer than it is known."""
    for unit, size_s in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"
