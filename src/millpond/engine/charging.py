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
from millpond.engine.charges import EVERY_S, LEAST_S, Charges
from millpond.errors import MillpondError

_SQL = queries("charging")
_log = structlog.get_logger("millpond.worker")
# How often what would hold others up is settled: so much of each slot's time, owed by one org.
_SOON_S = 0.05
_SOON_OWED_S = 0.002


async def settle_all(charges: Charges, database: EngineDatabase, *, slots: int) -> None:
    """Settle now and then, for ever; what is left at the end is lost, a quarter of a second at most.

    What many runs of one org owe together is settled sooner: until then others wait, or go before, for as long as all
    slots need for it. After a commit of unknown outcome nothing is charged again: once too little is the lesser fault.
    """
    turns = max(1, round(EVERY_S / _SOON_S))
    turn = 0
    while True:
        await asyncio.sleep(_SOON_S)
        turn = (turn + 1) % turns
        is_whole = turn == 0
        soon_s = max(LEAST_S, slots * _SOON_OWED_S)
        due = charges.take(time.monotonic()) if is_whole else charges.take_ended(soon_s)
        crossed = charges.take_crossed() if is_whole else {}
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
