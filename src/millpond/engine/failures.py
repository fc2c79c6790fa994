"""Failures: how often in a row a step failed on a key, in all workers together.

Kept by `throttling` for one worker. Invariants: a failure is counted once, or not at all where whoever told of it is
cut off (those told of together may count twice where an answer was lost), in a transaction of its own; of many at a
time those of one worker together; nothing is read or written by a success but where a failure was counted here less
than a minute before: that ends the row for all.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.brakes import ROW_S, TRIPS_AFTER
from millpond.engine.leases import Lease
from millpond.types import NO_ORG

_SQL = queries("failures")
# A worker stopped in the middle of it would keep others from counting.
_LIMIT_S = 3.0


class Target(NamedTuple):
    """A key, and whose work on it is meant: an org's, or (0) everybody's."""

    owner: int
    key: str


class _Row(NamedTuple):
    """When a failure was counted here last, how many there were by then, and whether the step's code named the key."""

    at: float
    failures: int
    is_named: bool


class Failures:
    """The rows of failures to which this worker has added, by step."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._rows: dict[str, dict[Target, _Row]] = {}
        # A mark for each failure that waits to be counted, by whoever does so first for all of them.
        self._uncounted: defaultdict[tuple[str, Target], set[object]] = defaultdict(set)
        self._counting: WeakValueDictionary[tuple[str, Target], asyncio.Lock] = (
            WeakValueDictionary()
        )

    def of(self, step: str) -> Iterable[Target]:
        """Return the keys on which a step failed here."""
        return self._rows.get(step, ())

    def is_enough(self, step: str, target: Target) -> bool:
        """Whether a breaker has to open by what was counted here last."""
        row = self._rows.get(step, {}).get(target)
        return row is not None and row.failures >= TRIPS_AFTER

    async def add(self, lease: Lease, step: str, target: Target, *, is_named: bool) -> bool:
        """Count a failure under a lease; whether a breaker has to open by it, which is told to one of those waiting."""
        mark, waiting = object(), self._uncounted[step, target]
        waiting.add(mark)
        try:
            async with self._counting.setdefault((step, target), asyncio.Lock()):
                if mark not in waiting:
                    return False
                taken = set(waiting)
                own = lease.org_id, lease.item_id, lease.token
                async with self._database.duty("failing", durable=False, limit_s=_LIMIT_S) as con:
                    counted: int | None = await con.fetchval(
                        _SQL["count"], *own, *target, step, len(taken), round(ROW_S * 1e6)
                    )
                if counted is None:
                    return False  # its lease is gone; the next of those waiting counts the others
                waiting -= taken
        finally:
            waiting.discard(mark)
            if not waiting and self._uncounted.get((step, target)) is waiting:
                del self._uncounted[step, target]
        rows = self._rows.setdefault(step, {})
        rows[target] = _Row(time.monotonic(), counted, is_named)
        self._sweep(step, rows)
        return counted >= TRIPS_AFTER

    async def end(self, lease: Lease, step: str, targets: Iterable[Target]) -> None:
        """End rows on these keys, and on those that the step's code named itself, by a success."""
        if (rows := self._rows.get(step)) is None:
            return
        ended = {target for target, row in rows.items() if row.is_named}.union(targets)
        # Rows are locked in one order in all workers.
        own = sorted(one for one in ended & rows.keys() if one.owner in (NO_ORG, lease.org_id))
        for target in own:
            del rows[target]
        self._sweep(step, rows)
        if own:
            async with self._database.duty("failing_over", durable=False, limit_s=_LIMIT_S) as con:
                await con.execute(
                    _SQL["end"],
                    *(lease.org_id, lease.item_id, lease.token),
                    [target.owner for target in own],
                    [target.key for target in own],
                    [step] * len(own),
                )

    def forget(self, step: str, target: Target) -> None:
        """Forget a row by which a breaker opened."""
        if (rows := self._rows.get(step)) is not None:
            rows.pop(target, None)
            self._sweep(step, rows)

    def _sweep(self, step: str, rows: dict[Target, _Row]) -> None:
        """Forget rows that were broken off."""
        now = time.monotonic()
        for target in [target for target, row in rows.items() if now - row.at > ROW_S]:
            del rows[target]
        if not rows:
            self._rows.pop(step, None)

    def __bool__(self) -> bool:
        """Whether any step failed here."""
        return bool(self._rows)
