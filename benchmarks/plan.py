"""The plan of one benchmark run: what was asked for on the command line, and what each suite makes of it.

Passed by `compare` to every suite. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rounds, times and sizes of a run; None leaves them to the suite."""

    rounds: int | None = None
    seconds: float | None = None
    depth: int | None = None
    waiting: int | None = None
    orgs: int | None = None
    scale: float = 1.0
    systems: Sequence[str] = ()
    features: Sequence[str] = ()

    def rounds_or(self, usual: int) -> int:
        """Return how often to measure."""
        return usual if self.rounds is None else self.rounds

    def seconds_or(self, usual: float) -> float:
        """Return how long to measure."""
        return usual if self.seconds is None else self.seconds

    def runs(self, usual: int) -> int:
        """Return a count of runs, scaled."""
        return max(2, round(usual * self.scale))
