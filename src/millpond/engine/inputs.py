"""Inputs: the big ones of claimed runs, which the claim itself does not carry.

Called by the worker between claim and execution. Invariant: every claimed run has its input afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from millpond.db.pool import EngineDatabase
from millpond.engine import payloads
from millpond.engine.leases import Claimed
from millpond.engine.payloads import INPUT


async def complete(database: EngineDatabase, claimed: Sequence[Claimed]) -> list[Claimed]:
    """Return claimed work with the inputs that stand in rows of their own; asks only if there are any."""
    wanted = [
        (one.lease.org_id, one.lease.run_id, INPUT)
        for one in claimed
        if one.input is None and not one.lease.is_of_step
    ]
    if not wanted:
        return list(claimed)
    async with database.statement("big_inputs") as con:
        texts = await payloads.read(con, wanted)
    return [
        one._replace(input=texts.get((one.lease.org_id, one.lease.run_id, INPUT), one.input))
        for one in claimed
    ]
