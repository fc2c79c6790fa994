"""Waking: strands whose wait is over go on, while others of the same attempt still work.

`performing` notes the attempts of which some strands wait and some work; a loop of the worker asks the
database about their waits, and about nothing while there are none. Invariant: a strand goes on with the
committed record of its wait's end, read under a lease that held; whether an attempt parks as a whole is
decided by the park's own transaction, and a strand of an attempt that has closed is never woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.branches import Branches, Parked
from millpond.engine.history import Recorded, read
from millpond.engine.leases import Lease
from millpond.errors import MillpondError

_SQL = queries("waking")
_log = structlog.get_logger("millpond.waking")

POLL_S = 0.1
MAX_POLL_S = 0.25
# Where asking takes long, as about very many waits, it is done less often.
_REST_PER_ASK = 10


class Mixed:
    """The attempts of one worker of which some strands wait while others work."""

    def __init__(self) -> None:
        self._attempts: dict[Branches, Lease] = {}
        self._some = asyncio.Event()

    def add(self, lease: Lease, branches: Branches) -> None:
        """Count an attempt in."""
        self._attempts[branches] = lease
        self._some.set()

    async def some(self) -> None:
        """Wait until there is an attempt to look after."""
        await self._some.wait()

    def waits(self) -> list[tuple[Lease, Branches, Parked]]:
        """Return the strands whose end is not known yet; attempts that have closed or all work are dropped."""
        found = []
        for branches, lease in list(self._attempts.items()):
            parked = [] if branches.closed is not None else branches.parked
            if not parked:
                del self._attempts[branches]
            found += [
                (lease, branches, one) for one in parked if one.end is None and one.ask is None
            ]
        if not self._attempts:
            self._some.clear()
        return found


async def wake_all(database: EngineDatabase, mixed: Mixed) -> None:
    """Wake strands as their waits end, for as long as the worker runs."""
    loop = asyncio.get_running_loop()
    pause_s = POLL_S
    while True:
        await mixed.some()
        await asyncio.sleep(pause_s)
        began = loop.time()
        try:
            await wake(database, mixed)
        except MillpondError as error:
            _log.warning("waking.failed", error=error.code)
        took_s = loop.time() - began
        pause_s = min(max(POLL_S, took_s * _REST_PER_ASK), MAX_POLL_S)


async def wake(database: EngineDatabase, mixed: Mixed) -> None:
    """Wake the strands whose waits are over now."""
    asked = mixed.waits()
    if not asked:
        return
    for nth, end in await _over(database, [(lease, one.step_key) for lease, _, one in asked]):
        _, branches, parked = asked[nth]
        branches.wake(parked, end)


async def _over(
    database: EngineDatabase, asked: Sequence[tuple[Lease, str]]
) -> list[tuple[int, Recorded]]:
    """Return which of the waits are over, by their place, each with its record."""
    async with database.statement("wake") as con:
        rows = await con.fetch(
            _SQL["over"],
            [lease.org_id for lease, _ in asked],
            [lease.item_id for lease, _ in asked],
            [lease.token for lease, _ in asked],
            [step_key for _, step_key in asked],
        )
    return [(row["ord"] - 1, read(row)) for row in rows]
