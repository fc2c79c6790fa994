"""A steady drain: runs are added as fast as they are drained, for a given time.

Called by the suites `backlog`, `retention`, `steadiness` and `waiting`; `blocked` uses its clock of claims. Invariant:
the producer is a process of its own, and what it could not keep up with is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.feeder import feeder
from benchmarks.flows import SEEN, noop
from benchmarks.ground import Ground
from benchmarks.measures import SLOTS
from millpond.engine.claim import Claimer
from millpond.engine.registry import Flow
from millpond.engine.retention import Keep

TICK_S = 0.02
# Slots fill and statements are prepared before the clock runs.
WARM_S = 2.0


@dataclass
class Steady:
    """What a steady drain came to."""

    # Runs drained by the end of each tick, and when that was, from the start.
    ticks: list[tuple[float, int]] = field(default_factory=list)
    claims_s: list[float] = field(default_factory=list)
    # The share of what was drained that the producer had put back by the end.
    refilled: float = 1.0

    @property
    def rate(self) -> float:
        """Runs per second over the whole time."""
        return self.rate_between(0.0, self.ticks[-1][0])

    def rate_between(self, start_s: float, end_s: float) -> float:
        """Runs per second in a part of the time; one without any counts as if it had one."""
        inside = [tick for tick in self.ticks if start_s <= tick[0] <= end_s] or self.ticks
        (first_at, first), (last_at, last) = inside[0], inside[-1]
        return max(1, last - first) / max(TICK_S, last_at - first_at)


async def drain_steadily(
    at: Ground, org_id: int, *, seconds: float, flow: Flow = noop, keep: Keep | None = None
) -> Steady:
    """Drain for `seconds` what waits in an org, runs of one flow, and have as much put back all the time.

    With `keep` the worker prunes what is older meanwhile.
    """
    found = Steady()
    SEEN.forget()
    warm_s = min(WARM_S, seconds / 4)
    async with feeder(at.urls, org_id, flow) as fed:
        with claims_timed(found.claims_s):
            async with at.worker([flow], SLOTS, keep):
                while not SEEN.starts:
                    await asyncio.sleep(0.001)
                began = time.perf_counter() + warm_s
                # Also where this process stood still for all that time.
                while (
                    (now := time.perf_counter() - began) < seconds
                    or not found.claims_s
                    or not found.ticks
                ):
                    fed.feed(SEEN.starts)
                    if now >= 0:
                        found.ticks.append((now, SEEN.starts))
                    else:
                        found.claims_s.clear()
                    await asyncio.sleep(TICK_S)
                found.refilled = fed.fed / max(1, SEEN.starts)
        # What the drain of the slots took after the clock stopped is put back, too.
        fed.feed(SEEN.starts)
        while fed.fed < fed.asked:
            await asyncio.sleep(TICK_S)
    return found


@contextmanager
def claims_timed(into: list[float]) -> Iterator[None]:
    """Note the seconds of every claim of this process that leased something."""
    claim = Claimer.claim

    async def timed(self: Claimer, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = await claim(self, *args, **kwargs)
        if found[0]:
            into.append(time.perf_counter() - began)
        return found

    Claimer.claim = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Claimer.claim = claim  # type: ignore[method-assign]
