"""Simulated: figures of a simulation: waits and shares by org, how full slots and limits were, how fair it was. Pure.

Called by whoever simulates. Invariant: shares are of the time until the last arrival, as long as there is something
to share; waits are of all runs but those that never began.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan

from millpond.engine.loads import Load, Outcome
from millpond.engine.rules import RoomId


@dataclass(frozen=True, kw_only=True, slots=True)
class Waits:
    """How long runs waited to begin, in seconds; all 0 where none did."""

    runs: int
    never: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OrgFigures:
    """One org: its waits, the worker-seconds it had while runs arrived, and what part of all of them that is."""

    org_id: int
    waits: Waits
    worker_s: float
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomFigures:
    """One concurrency limit where work met it: the most in use at once, and what part of the time it was full."""

    room: RoomId
    most_in_use: int
    full_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """A simulation in figures; `arrivals_s` is how long runs arrived, `until_s` when the last one ended.

    `jain` is Jain's index of what orgs had against what max-min fairness by weight would give them: 1 is fair to all,
    1/n is all for one of n. `slots_share` is the part of all slots that was used while runs arrived, by queue.
    """

    arrivals_s: float
    until_s: float
    waits: Waits
    jain: float
    slots_share: dict[str, float]
    orgs: list[OrgFigures]
    rooms: list[RoomFigures]


@dataclass(slots=True)
class _Part:
    """What one org asked for and had in one queue, in worker-seconds."""

    asked_s: float = 0.0
    had_s: float = 0.0


@dataclass(slots=True)
class _Of:
    waited_s: array[float] = field(default_factory=lambda: array("d"))
    never: int = 0
    had_s: float = 0.0


def figures(
    load: Load,
    outcome: Outcome,
    workers: Sequence[Mapping[str, int]],
    *,
    weights: Mapping[int, float] | None = None,
) -> Figures:
    """Sum up what a simulation made of a load."""
    window_s = load.at_s[-1] if len(load) else 0.0
    orgs: defaultdict[int, _Of] = defaultdict(_Of)
    parts: defaultdict[tuple[str, int], _Part] = defaultdict(_Part)
    by_work = [(orgs[one.org_id], parts[one.queue, one.org_id]) for one in load.works]
    for at_s, service_s, work, start_s in zip(
        load.at_s, load.service_s, load.work, outcome.starts_s, strict=True
    ):
        of, part = by_work[work]
        part.asked_s += service_s
        if isnan(start_s):
            of.never += 1
            continue
        of.waited_s.append(start_s - at_s)
        had_s = max(0.0, min(start_s + service_s, window_s) - start_s)
        part.had_s += had_s
        of.had_s += had_s
    slots = _slots(workers)
    all_s = sum(one.had_s for one in orgs.values())
    return Figures(
        arrivals_s=window_s,
        until_s=outcome.until_s,
        waits=_waits_of_all(orgs.values()),
        jain=jain(_satisfaction(parts, slots, window_s, weights or {})),
        slots_share=_used(parts, slots, window_s),
        orgs=[
            OrgFigures(
                org_id=org_id,
                waits=waits(sorted(of.waited_s), of.never),
                worker_s=of.had_s,
                share=of.had_s / all_s if all_s else 0.0,
            )
            for org_id, of in sorted(orgs.items())
        ],
        rooms=_rooms(outcome, max(window_s, outcome.until_s)),
    )


def waits(waited_s: Sequence[float], never: int) -> Waits:
    """Sum up waits, which are sorted; `never` runs did not begin."""
    count = len(waited_s)

    def at(part: float) -> float:
        return waited_s[min(count - 1, int(part * count))] if count else 0.0

    return Waits(
        runs=count + never,
        never=never,
        mean_s=sum(waited_s) / count if count else 0.0,
        p50_s=at(0.5),
        p95_s=at(0.95),
        p99_s=at(0.99),
        max_s=waited_s[-1] if count else 0.0,
    )


def jain(values: Sequence[float]) -> float:
    """Return Jain's index of fairness (Jain, Chiu, Hawe, DEC-TR-301, 1984): 1 where all are equal."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def max_min(
    asked: Mapping[int, float], capacity: float, weights: Mapping[int, float]
) -> dict[int, float]:
    """Share a capacity by weighted max-min fairness: nobody gets more than asked, what is left goes to the others."""
    fair: dict[int, float] = {}
    left, weight = capacity, sum(weights.get(one, 1.0) for one in asked)
    for one in sorted(asked, key=lambda one: asked[one] / weights.get(one, 1.0)):
        mine = weights.get(one, 1.0)
        fair[one] = min(asked[one], left * mine / weight)
        left -= fair[one]
        weight -= mine
    return fair


def _satisfaction(
    parts: Mapping[tuple[str, int], _Part],
    slots: Mapping[str, int],
    window_s: float,
    weights: Mapping[int, float],
) -> list[float]:
    """Return what each org had in each queue, against what it should have had."""
    asked: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for (queue, org_id), part in parts.items():
        if part.asked_s > 0:
            asked[queue][org_id] = part.asked_s
    found: list[float] = []
    for queue, of in asked.items():
        fair = max_min(of, slots.get(queue, 0) * window_s, weights)
        found += [
            parts[queue, org_id].had_s / fair_s for org_id, fair_s in fair.items() if fair_s > 0
        ]
    return found


def _slots(workers: Sequence[Mapping[str, int]]) -> dict[str, int]:
    slots: defaultdict[str, int] = defaultdict(int)
    for worker in workers:
        for queue, count in worker.items():
            slots[queue] += count
    return dict(slots)


def _used(
    parts: Mapping[tuple[str, int], _Part], slots: Mapping[str, int], window_s: float
) -> dict[str, float]:
    used = dict.fromkeys(slots, 0.0)
    for (queue, _), part in parts.items():
        if window_s > 0 and slots.get(queue):
            used[queue] += part.had_s / (slots[queue] * window_s)
    return used


def _waits_of_all(orgs: Iterable[_Of]) -> Waits:
    waited_s = array("d")
    never = 0
    for of in orgs:
        waited_s.extend(of.waited_s)
        never += of.never
    return waits(sorted(waited_s), never)


def _rooms(outcome: Outcome, until_s: float) -> list[RoomFigures]:
    return [
        RoomFigures(
            room=room,
            most_in_use=most,
            full_share=outcome.full_s.get(room, 0.0) / until_s if until_s > 0 else 0.0,
        )
        for room, most in sorted(outcome.most_in_use.items())
    ]
