"""Brakes: what a throttled or broken provider does to work on its key, and how that wears off. Pure: no I/O, no clock.

Called by `throttling` (what workers tell), `rules` (the claim) and `easing` (what people see). Invariants: the end of
a cooldown only ever moves on; what a key is allowed is lowered at once and grows back with time alone, so that nothing
is written as it does; a brake that is over holds back nothing.
Additive increase, multiplicative decrease: Chiu, Jain, "Analysis of the Increase and Decrease Algorithms", 1989.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil, floor

_US = 1_000_000
# Each new cooldown leaves this part of what was allowed, and no less than the smallest.
DECREASE = 0.5
SMALLEST = 0.05
# So much of the whole comes back each second, and one place where it is places.
RECOVERY_PER_S = 0.01
# Without a wish of the other side: doubled with each cooldown in a row.
FIRST_S, MOST_UNASKED_S = 2.0, 60.0
# No wish of the other side counts for longer; it will say so again.
MOST_S = 3600.0
# Ends are rounded up to this, so that many answers of one moment say the same.
_GRID_US = 250_000
# A breaker opens after so many failures in a row, each so soon after the one before it.
TRIPS_AFTER = 5
ROW_S = 60.0
FIRST_OPEN_S, MOST_OPEN_S = 10.0, 300.0
# A breaker of which no probe told anything for so long is over: the step that opened it may be no more.
UNPROBED_S = 3600.0
NO_CEILING = 2**31


class BrakeState(StrEnum):
    """How a brake holds back work on its key."""

    COOLING = "cooling"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RECOVERING = "recovering"
    OVER = "over"


@dataclass(frozen=True, kw_only=True, slots=True)
class Brake:
    """What holds back work on a key: of all orgs (`owner` 0), or of one.

    Nothing goes before `until_us`; then `factor` of what is allowed, and more with time. `in_use` is how much was under
    way when it was throttled. A breaker that is open since `opened_us` lets one probe go after `until_us`, and stays
    so until a step of the name that failed (`step`) succeeds, or nobody asked for long. `hits` counts cooldowns, or
    openings, in a row.
    """

    owner: int
    key: str
    until_us: int
    factor: float
    in_use: int
    hits: int
    opened_us: int | None = None
    step: str = ""
    reason: str = ""

    @property
    def over_us(self) -> int:
        """When it has worn off, or when a breaker was probed by nobody for too long."""
        if self.opened_us:
            return self.until_us + ceil(UNPROBED_S * _US)
        return self.until_us + ceil((1.0 - self.factor) / RECOVERY_PER_S * _US)

    def factor_at(self, now_us: int) -> float:
        """Return which part of what is allowed on the key is so now."""
        if self.opened_us:
            return 1.0 if now_us >= self.over_us else self.factor
        grown = max(0, now_us - self.until_us) / _US * RECOVERY_PER_S
        return min(1.0, self.factor + grown)

    def ceiling_at(self, now_us: int) -> int:
        """Return how much may be under way on the key now, whatever else limits it."""
        match self.state_at(now_us):
            case BrakeState.COOLING | BrakeState.OPEN:
                return 0
            case BrakeState.HALF_OPEN:
                return 1
            case BrakeState.OVER:
                return NO_CEILING
        grown = (now_us - self.until_us) // _US
        return max(1, floor(self.in_use * self.factor_at(now_us))) + grown

    def state_at(self, now_us: int) -> BrakeState:
        """Return how it holds back work now."""
        if now_us < self.until_us:
            return BrakeState.OPEN if self.opened_us else BrakeState.COOLING
        if now_us >= self.over_us:
            return BrakeState.OVER
        return BrakeState.HALF_OPEN if self.opened_us else BrakeState.RECOVERING


def throttled(
    brake: Brake | None, *, owner: int, key: str, now_us: int, wish_s: float | None, in_use: int
) -> Brake:
    """Return the brake after the other side said that it is asked too much.

    What was under way as a cooldown began may say so too: it makes it longer, not deeper. An open breaker stays so.
    """
    held = _held(brake, owner, key, now_us)
    is_cooling = now_us < held.until_us
    hits = held.hits if is_cooling else held.hits + 1
    wait_s = min(MOST_UNASKED_S, FIRST_S * 2.0 ** min(hits - 1, 30)) if wish_s is None else wish_s
    until_us = max(held.until_us, _end_us(now_us, min(MOST_S, wait_s)))
    if is_cooling:
        return replace(held, until_us=until_us)
    factor = max(SMALLEST, held.factor_at(now_us) * DECREASE)
    return replace(held, until_us=until_us, factor=factor, in_use=max(1, in_use), hits=hits)


def tripped(brake: Brake | None, *, owner: int, key: str, now_us: int, in_use: int) -> Brake:
    """Return the brake after too many failures in a row, or after one of a probe; one that stands open is left."""
    held = _held(brake, owner, key, now_us)
    if held.opened_us and now_us < held.until_us:
        return held
    hits = held.hits + 1 if held.opened_us else 1
    open_s = min(MOST_OPEN_S, FIRST_OPEN_S * 2.0 ** min(hits - 1, 30))
    return replace(
        held,
        until_us=max(held.until_us, _end_us(now_us, open_s)),
        factor=max(SMALLEST, held.factor_at(now_us) * DECREASE),
        in_use=held.in_use if held.opened_us else max(1, in_use),
        hits=hits,
        opened_us=held.opened_us or now_us,
    )


def reached(brake: Brake, now_us: int) -> Brake:
    """Return the brake after the other side answered: a breaker that let a probe go is closed, and recovers."""
    if brake.state_at(now_us) is not BrakeState.HALF_OPEN:
        return brake
    return replace(brake, until_us=max(brake.until_us, now_us), hits=0, opened_us=None)


def _held(brake: Brake | None, owner: int, key: str, now_us: int) -> Brake:
    """Return what holds now: one that is over is as none."""
    if brake is None or brake.state_at(now_us) is BrakeState.OVER:
        until_us = 0 if brake is None else brake.until_us
        return Brake(owner=owner, key=key, until_us=until_us, factor=1.0, in_use=1, hits=0)
    return brake


def _end_us(now_us: int, wait_s: float) -> int:
    return -(-(now_us + ceil(wait_s * _US)) // _GRID_US) * _GRID_US
