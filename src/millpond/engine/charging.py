"""Charging: what orgs used of a queue's worker time, against what their claims were charged by an estimate.

Counted by `slots` for one worker, settled by its `worker` in the background. Invariants: an org's virtual time in a
queue is moved under the claim's lock only; what an attempt was charged by its claim and what it is charged here come to
the time that its code executed, also while it still does; a difference too small to matter waits for more.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.errors import MillpondError

_SQL = queries("charging")
_log = structlog.get_logger("millpond.worker")
EVERY_S = 0.25
# Less than this of an org is not worth a write, in worker-seconds.
_LEAST_S = 0.005


@dataclass(eq=False, slots=True)
class Use:
    """The time of one attempt: since when it executes, by the monotonic clock, and how many seconds are charged."""

    org_id: int
    queue: str
    charged_s: float
    began: float


class Charges:
    """The differences of one worker that are not settled yet, by org and queue, in worker-seconds."""

    def __init__(self) -> None:
        self._owed: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._live: set[Use] = set()

    def begin(self, org_id: int, queue: str, estimate_s: float, began: float) -> Use:
        """Count an attempt in that its claim was charged by an estimate."""
        use = Use(org_id, queue, estimate_s, began)
        self._live.add(use)
        return use

    def end(self, use: Use, used_s: float) -> None:
        """Count it out: charge what it used beyond what it was charged, or give back what it did not use."""
        self._live.discard(use)
        self._owe(use, used_s)

    def _owe(self, use: Use, used_s: float) -> None:
        self._owed[use.org_id, use.queue] += used_s - use.charged_s
        use.charged_s = used_s

    def take(self, now: float) -> dict[tuple[int, str], float]:
        """Return what is to be settled now, and count it as settled."""
        for use in self._live:
            if now - use.began > use.charged_s:
                self._owe(use, now - use.began)
        due = {key: owed for key, owed in self._owed.items() if abs(owed) >= _LEAST_S}
        for key in due:
            del self._owed[key]
        return due

    async def settle_all(self, database: EngineDatabase) -> None:
        """Settle now and then, for ever; what is left at the end is lost, a quarter of a second at most.

        After a commit of unknown outcome nothing is charged again: once too little is the lesser fault.
        """
        while True:
            await asyncio.sleep(EVERY_S)
            due = self.take(time.monotonic())
            if not due:
                continue
            try:
                await settle(database, due)
            except MillpondError as error:
                _log.warning("charge.failed", error=error.code)


async def settle(database: EngineDatabase, due: dict[tuple[int, str], float]) -> None:
    """Move orgs' virtual times by worker-seconds over their weights."""
    async with database.statement("charge") as con:
        await con.execute(
            _SQL["charge"],
            [org_id for org_id, _ in due],
            [queue for _, queue in due],
            list(due.values()),
        )
