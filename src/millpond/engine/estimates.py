"""Estimates: how long one work item of a capability is expected to take. Pure: no I/O, no clock.

Called by `slots` (each worker for itself) and `simulating`. Invariant: what was learned last weighs most, and an
estimate is never nothing, so that every pick costs its org something.
"""

from __future__ import annotations

# So much worker time an org's small work may take at one turn (`admission`).
TURN_S = 0.002
# Little, and more than what goes a few at one turn: what unknown work uses beyond it is charged within a quarter of a
# second, but who comes while a claim is charged too much begins behind that, and stays there when it is given back.
FIRST_GUESS_S = 1.25 * TURN_S
_WEIGHT_OF_NEWEST = 0.1
_LEAST_S = 1e-6
# A claim for no more slots than these is not parted, where work takes less than so long.
_HALVED = 32
_LONG_S = 0.01
# Where it takes longer, a claim is for so large a part of the slots at most, but for so many.
_PARTS = 4
_FEW = 4
# How much of what is known of a queue's work the last attempt tells.
_NEWS = 1 / 32


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


class Pace:
    """How long the work of a queue takes, and so how many of its slots one claim may fill."""

    __slots__ = ("_takes_s",)

    def __init__(self) -> None:
        self._takes_s = 0.0

    def learn(self, used_s: float) -> None:
        """Learn from how long an attempt took."""
        known_s = self._takes_s
        self._takes_s = known_s + (used_s - known_s) * _NEWS if known_s else used_s

    def most(self, total: int) -> int:
        """Return how many of so many slots one claim may fill.

        Not more than half of many: while the database moves those, the other half executes. Where work takes longer
        than a claim, not more than a quarter: slots that are filled together are free together, and whoever comes just
        after that waits until then.
        """
        if self._takes_s >= _LONG_S:
            return max(_FEW, -(-total // _PARTS))
        return max(_HALVED, -(-total // 2))
