"""Metering: what runs used, written with what they did and folded into days in the background.

Called by `storing`, `remote`, `attempt` (what was spent on models) and `upkeep` (the folding); worker-seconds are
written by the statements that end leases. Invariants: a part is written in the transaction of the record that
it tells of, so that what a fence refuses is not counted, and a replay counts nothing; a part goes in the transaction
that adds it to its days, so that it is counted once.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine.lanes import KEY_SEPARATOR
from millpond.engine.leases import Lease, hold
from millpond.engine.tokens import used_keys
from millpond.errors import InvalidInput
from millpond.types import new_id

_SQL = queries("metering")
_log = structlog.get_logger("millpond.metering")
_BATCH = 2000
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Spent:
    """What one call of a model used, in tokens; of one that `is_cut` off nobody knows.

    `step_key` is that of a step with keys of its own which called it, `carried` the providers and models among these.
    """

    model: str
    input_tokens: int
    output_tokens: int
    is_cut: bool = False
    step_key: str = ""
    carried: Sequence[str] = ()

    def check(self) -> None:
        """Raise InvalidInput for what cannot be counted."""
        if not 1 <= len(self.model) <= 200 or "\0" in self.model:
            raise InvalidInput("a model's name has 1 to 200 characters", param="model")
        for name in ("input_tokens", "output_tokens"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise InvalidInput(f"tokens are a whole number from 0 to {_MOST}", param=name)


async def store(con: Connection, spent: Sequence[tuple[Lease, Spent]]) -> None:
    """Store what was spent on models under leases, at the prices of this moment; claims settle tokens by it."""
    if not spent:
        return
    await con.execute(
        _SQL["spend"],
        [new_id() for _ in spent],
        [lease.org_id for lease, _ in spent],
        [lease.run_id for lease, _ in spent],
        [one.model for _, one in spent],
        [one.input_tokens for _, one in spent],
        [one.output_tokens for _, one in spent],
        [lease.item_id for lease, _ in spent],
        [lease.token for lease, _ in spent],
        [KEY_SEPARATOR.join(used_keys(one.model)) for _, one in spent],
        [one.is_cut for _, one in spent],
        [one.step_key for _, one in spent],
        [KEY_SEPARATOR.join(one.carried) for _, one in spent],
    )


async def keep(database: EngineDatabase, lease: Lease, spent: Sequence[Spent]) -> None:
    """Store what an attempt spent, in a transaction of its own; raises LeaseLost."""
    async with database.duty("spend") as con:
        await hold(con, lease)
        await store(con, [(lease, one) for one in spent])


async def fold(database: EngineDatabase, *, only_spent: bool = False) -> bool:
    """Add parts to their days, or those alone that tell of models; returns whether more are left."""
    try:
        return await _fold(database, _BATCH, only_spent=only_spent) == _BATCH
    except InvalidInput:
        return await _fold_singly(database)


async def _fold(
    database: EngineDatabase,
    limit: int,
    part_id: uuid.UUID | None = None,
    *,
    only_spent: bool = False,
) -> int:
    async with database.statement("fold_usage") as con:
        folded: int = await con.fetchval(_SQL["fold"], limit, part_id, only_spent)
    return folded


async def _fold_singly(database: EngineDatabase) -> bool:
    """Add parts one by one, so that one that cannot be added stops no other; it is removed, and the log tells."""
    async with database.statement("usage_parts") as con:
        rows = await con.fetch(_SQL["part_ids"], _BATCH)
    for row in rows:
        try:
            await _fold(database, 1, row["part_id"])
        except InvalidInput as error:
            _log.error("usage.part_dropped", part_id=str(row["part_id"]), error=error.code)
            async with database.duty("drop_usage") as con:
                await con.execute(_SQL["drop_part"], row["part_id"])
    return len(rows) == _BATCH
