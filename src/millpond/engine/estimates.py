"""Estimates: how long one work item of a capability is expected to take. Pure: no I/O, no clock.

Called by `slots` (each worker for itself) and `simulating`. Invariant: what was learned last weighs most, and an
estimate is never nothing, so that every pick costs its org something.
"""

from __future__ import annotations

FIRST_GUESS_S = 0.05
_WEIGHT_OF_NEWEST = 0.1
_LEAST_S = 1e-6


class Estimates:
    """Moving averages of service, in worker-seconds, by capability."""

    __slots__ = ("_averages",)

    def __init__(self) -> None:
        self._averages: dict[str, float] = {}

    def learn(self, capability: str, used_s: float) -> None:
        """Learn from how long an attempt took."""
        before = self._averages.pop(capability, used_s)  # so that it stands last
        self._averages[capability] = before + _WEIGHT_OF_NEWEST * (used_s - before)

    def estimate_s(self, capability: str) -> float:
        """Return the expected service of one work item, in worker-seconds."""
        return max(_LEAST_S, self._averages.get(capability, FIRST_GUESS_S))

    def newest(self, most: int) -> dict[str, float]:
        """Return the averages that were learned last, to two digits."""
        known = list(self._averages.items())[-most:]
        return {able: float(f"{max(_LEAST_S, average):.2g}") for able, average in sorted(known)}
