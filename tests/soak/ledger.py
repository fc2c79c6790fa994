"""The ledger: what a counter at a provider saw, against limits that were edited meanwhile. Pure.

Invariants: the checks are exact over all windows between two arrivals, not sampled; times are seconds of one monotonic
clock. An edit holds from some moment between its sending (`sent_s`) and its answer (`done_s`): until then the higher of
both limits counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

# So long after its claim a call may arrive.
LATE_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A limit that was set: a rate is per second."""

    sent_s: float
    done_s: float
    value: float


@dataclass
class Allowance:
    """How many calls a rate has allowed until any time, of edits in their order; the first one holds from ever on.

    A rate that is lowered lets more go once, at most its burst times the part by which it was lowered: what its meter
    says was used up is less of the longer intervals.
    """

    edits: Sequence[Edit]
    burst: float
    _at_s: list[float] = field(default_factory=list)
    _sum: list[float] = field(default_factory=list)
    _rate: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._at_s, self._sum, self._rate = [-inf], [0.0], [self.edits[0].value]
        for before, after in pairwise(self.edits):
            if after.value >= before.value:
                self._add(after.sent_s, after.value)
            else:
                once = self.burst * (1 - after.value / before.value)
                self._add(after.sent_s, before.value, once)
                self._add(after.done_s, after.value)

    def _add(self, at_s: float, rate: float, once: float = 0.0) -> None:
        self._sum.append(self.until(at_s) + once)
        self._at_s.append(at_s)
        self._rate.append(rate)

    def until(self, at_s: float) -> float:
        """Return the calls allowed until a time; only differences mean something."""
        nth = bisect_right(self._at_s, at_s) - 1
        since_s = self._at_s[nth] if nth else 0.0
        return self._sum[nth] + self._rate[nth] * (at_s - since_s)

    def between(self, begin_s: float, end_s: float) -> float:
        """Return what the rate alone allows in a time, without burst and what is let go once."""
        edges = [begin_s, *(at for at in self._at_s if begin_s < at < end_s), end_s]
        return sum(
            self._rate[bisect_right(self._at_s, one) - 1] * (other - one)
            for one, other in pairwise(edges)
        )


def most_over(at_s: Sequence[float], allowance: Allowance, *, late_s: float = LATE_S) -> float:
    """Return by how many calls the worst window is above rate × (window + late) + burst; at most 0 where none is.

    Of all windows from an arrival to it or to a later one. `at_s` is in order.
    """
    worst, best = -inf, -inf
    for nth, arrived_s in enumerate(at_s):
        best = max(best, allowance.until(arrived_s - late_s) - nth)
        worst = max(worst, nth + 1 - allowance.until(arrived_s) + best)
    return worst - allowance.burst


def most_in_flight_over(
    at_s: Sequence[float], in_flight: Sequence[int], edits: Sequence[Edit], *, grace_s: float
) -> float:
    """Return by how many calls more were ever in flight than a concurrency limit allowed.

    What was admitted before a limit was lowered goes on: its calls count for `grace_s` under the one before.
    """
    starts = [-inf, *(edit.sent_s for edit in edits[1:])]
    ends = [*(edit.done_s + grace_s for edit in edits[1:]), inf]
    worst = -inf
    for arrived_s, count in zip(at_s, in_flight, strict=True):
        ceiling = max(
            edit.value
            for edit, start_s, end_s in zip(edits, starts, ends, strict=True)
            if start_s <= arrived_s <= end_s
        )
        worst = max(worst, count - ceiling)
    return worst


def used(at_s: Sequence[float], allowance: Allowance, begin_s: float, end_s: float) -> float:
    """Return what part of the calls that a rate allows in a time arrived in it."""
    arrived = sum(begin_s <= one < end_s for one in at_s)
    return arrived / allowance.between(begin_s, end_s)


def times_full(
    at_s: Sequence[float], in_flight: Sequence[int], edits: Sequence[Edit], begin_s: float
) -> float:
    """Return what part of arrivals since a time filled a concurrency limit's last place."""
    counts = [
        count >= _last(edits, arrived_s)
        for arrived_s, count in zip(at_s, in_flight, strict=True)
        if arrived_s >= begin_s
    ]
    return sum(counts) / max(1, len(counts))


def _last(edits: Sequence[Edit], at_s: float) -> float:
    return max((edit for edit in edits if edit.done_s <= at_s), key=lambda edit: edit.done_s).value
