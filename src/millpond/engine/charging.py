"""Charging: settles what orgs used of a queue's worker time, against what their claims were charged by an estimate.

Called by `worker` in the background; what is owed is counted by `charges`. Invariant: an org's virtual time in a queue
is moved under the claim's lock only.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.charges import EVERY_S, Charges
from millpond.errors import MillpondError

_SQL = queries("charging")
_log = structlog.get_logger("millpond.worker")


async def settle_all(charges: Charges, database: EngineDatabase) -> None:
    """Settle now and then, for ever; what is left at the end is lost, a quarter of a second at most.

    After a commit of unknown outcome nothing is charged again: once too little is the lesser fault.
    """
    while True:
        await asyncio.sleep(EVERY_S)
        due = charges.take(time.monotonic())
        crossed = charges.take_crossed()
        try:
            if due:
                await settle(database, due)
            if crossed:
                await settle_crossings(database, crossed)
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


async def settle_crossings(
    database: EngineDatabase, due: dict[tuple[int, str, str], float]
) -> None:
    """Move where orgs stand in rooms that several queues need, by worker-seconds over their weights in the queue."""
    async with database.statement("charge_crossings") as con:
        await con.execute(
            _SQL["charge_crossings"],
            [org_id for org_id, _, _ in due],
            [queue for _, queue, _ in due],
            [room for _, _, room in due],
            list(due.values()),
        )
