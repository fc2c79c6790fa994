"""Pacing: the arithmetic of what is allowed per period, requests and tokens. Pure: no I/O, no clock.

Called by `counting` (the claim), `ceilings` and `saturation` (what people see). Invariants: no window of `w` seconds
lets more go than the rate earns in it and the burst, but for tokens used beyond what was reserved; those are owed.
The generic cell rate algorithm (ITU-T I.371), kept as the theoretical arrival time.
"""

from __future__ import annotations

from math import ceil

from millpond.engine.rules import MAX_SPAN_S, Rule

_MAX_SPAN_US = MAX_SPAN_S * 1_000_000


def meter_us(rule: Rule, tat_us: int | None, now_us: int) -> int:
    """Return a rate's meter as it counts now: never behind, and no further ahead than its limit can put it.

    A meter that an earlier, slower limit has put further ahead does not hold back what the present one allows. That of
    tokens is ahead by what was used beyond its burst too, and is told anew for another limit (`repaced`).
    """
    if rule.is_of_tokens:
        return max(now_us, now_us if tat_us is None else tat_us)
    return max(now_us, min(now_us if tat_us is None else tat_us, now_us + rule.span_us))


def allowed(rule: Rule, tat_us: int | None, now_us: int) -> int:
    """Return how many may go now at a rate; `tat_us` is the meter, None where nothing went before.

    Of tokens fewer than none where more was used than there was: that is owed.
    """
    if rule.maximum < 1:
        return 0
    left_us = rule.span_us - (meter_us(rule, tat_us, now_us) - now_us)
    if rule.is_of_tokens:
        return min(rule.at_once, rule.earned(left_us))
    return max(0, min(rule.at_once, rule.earned(left_us)))


def spent(rule: Rule, tat_us: int | None, now_us: int, count: int) -> int:
    """Return the meter after `count` went now, of those that were allowed."""
    return meter_us(rule, tat_us, now_us) + rule.cost_us(count)


def next_at_us(rule: Rule, tat_us: int, count: int = 1) -> int:
    """Return from when on so many more may go."""
    return tat_us - max(0, rule.span_us - rule.cost_us(count))


def repaced(rule: Rule, tat_us: int | None, pace: float | None, now_us: int) -> int | None:
    """Return a meter of tokens that was told at another pace: what is used stays used, whatever the limit is now."""
    if tat_us is None or pace is None or pace == rule.pace or tat_us <= now_us:
        return tat_us
    return now_us + min(_MAX_SPAN_US, ceil((tat_us - now_us) / pace * rule.pace))


def corrected(rule: Rule, tat_us: int | None, now_us: int, delta: int) -> int:
    """Return the meter of tokens after it was told that so many more were used than reserved, or fewer (below 0).

    Nothing comes back beyond the whole burst.
    """
    if delta >= 0:
        return spent(rule, tat_us, now_us, delta)
    back_us = (-delta * rule.period_us) // (rule.maximum or rule.at_once)
    return max(now_us, meter_us(rule, tat_us, now_us) - back_us)
