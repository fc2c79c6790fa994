"""Gathering: what becomes of an event that matched a trigger, and of a group whose time has come.

Called by `inbound` under the group's row lock. Pure: state, event and time go in, the new state and the
fires come out. Invariant: every event taken is in exactly one fire, dropped and counted, or still held;
it makes no difference how late `lapse` is called, other than how late its fire is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from millpond.types import Json

Mode = Literal["each", "debounce", "throttle", "batch"]

# What one run gets fits the input of a run, with room for what stands around it.
MAX_HELD_BYTES = 240 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a trigger gathers: `period_s` of debounce and throttle, the rest of debounce and batch."""

    mode: Mode
    period_s: float | None = None
    max_wait_s: float | None = None
    max_count: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """An event as a run will get it, with the size of that as JSON."""

    document: Json
    size_bytes: int


Fire = tuple[Held, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is held since `first_at` until `due_at`; `dropped` is how many got no run so far.

    Without events it is a throttle's period, which lasts until `due_at`.
    """

    events: tuple[Held, ...]
    first_at: datetime
    due_at: datetime | None
    dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The group as it goes on, None when nothing is left of it; and the runs to start, in order."""

    group: Group | None
    fires: tuple[Fire, ...] = ()


def take(rule: Rule, group: Group | None, event: Held, now: datetime) -> Decision:
    """Decide on an event that came at `now`; what was due before it goes first."""
    match rule.mode:
        case "each":
            return Decision(group=group, fires=((event,),))
        case "throttle":
            return _throttle(rule, group, event, now)
        case "debounce":
            return _debounce(rule, group, event, now)
        case "batch":
            return _batch(rule, group, event, now)


def lapse(group: Group, now: datetime) -> Decision:
    """Decide on a group when time has passed: what is due is fired and the group ends."""
    if not _is_over(group, now):
        return Decision(group=group)
    return Decision(group=None, fires=(group.events,) if group.events else ())


def _throttle(rule: Rule, group: Group | None, event: Held, now: datetime) -> Decision:
    """Fire at the leading edge; until the period ends, drop and count."""
    if group is not None and group.due_at is not None and not _is_over(group, now):
        return Decision(group=replace(group, dropped=group.dropped + 1))
    dropped = 0 if group is None else group.dropped
    begun = Group(events=(), first_at=now, due_at=_later(now, rule.period_s), dropped=dropped)
    return Decision(group=begun, fires=((event,),))


def _debounce(rule: Rule, group: Group | None, event: Held, now: datetime) -> Decision:
    """Hold the last event until none came for a period, or the first has waited long enough."""
    held, fires, dropped = _settled(group, now)
    first_at = held.first_at if held is not None else now
    due_at = _later(now, rule.period_s)
    if rule.max_wait_s is not None:
        due_at = min(due_at, _later(first_at, rule.max_wait_s))
    overtaken = len(held.events) if held is not None else 0
    begun = Group(events=(event,), first_at=first_at, due_at=due_at, dropped=dropped + overtaken)
    return Decision(group=begun, fires=fires)


def _batch(rule: Rule, group: Group | None, event: Held, now: datetime) -> Decision:
    """Gather until there are enough, the first has waited long enough, or no more fits one run."""
    held, fires, _ = _settled(group, now)
    if held is not None and _size(held.events) + event.size_bytes > MAX_HELD_BYTES:
        fires, held = (*fires, held.events), None
    events = (*(held.events if held is not None else ()), event)
    if len(events) >= (rule.max_count or 1):
        return Decision(group=None, fires=(*fires, events))
    first_at = held.first_at if held is not None else now
    begun = Group(events=events, first_at=first_at, due_at=_later(first_at, rule.max_wait_s))
    return Decision(group=begun, fires=fires)


def _settled(group: Group | None, now: datetime) -> tuple[Group | None, tuple[Fire, ...], int]:
    """Return what a group still holds, what was due of it, and its count of dropped events."""
    if group is None:
        return None, (), 0
    decision = lapse(group, now)
    return decision.group, decision.fires, group.dropped


def _is_over(group: Group, now: datetime) -> bool:
    return group.due_at is not None and group.due_at <= now


def _later(at: datetime, seconds: float | None) -> datetime:
    return at + timedelta(seconds=seconds or 0.0)


def _size(events: tuple[Held, ...]) -> int:
    return sum(event.size_bytes for event in events)
