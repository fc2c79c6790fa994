"""History: the recorded steps of a run, by step key, as replay meets them.

Called by the worker for claimed runs that have been claimed before, and by `context`. Invariant: a
key is made of branch path, name and occurrence alone, so the order of finishing never decides which
record a step gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.claim import Lease

_SQL = queries("waits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One recorded step; `output` and `error` are JSON text, `age_s` counts from its first try.

    `is_due` is false while a timer of this step still runs.
    """

    kind: str
    state: str
    output: str | None
    error: str | None
    tries: int
    age_s: float
    is_due: bool


History = dict[str, Recorded]


def just(kind: str, state: str, output: str | None, error: str | None) -> Recorded:
    """Return what was recorded a moment ago."""
    return Recorded(
        kind=kind, state=state, output=output, error=error, tries=1, age_s=0.0, is_due=True
    )


async def load(database: EngineDatabase, leases: Sequence[Lease]) -> dict[Lease, History]:
    """Read what is recorded of the leased runs, one query for all."""
    histories: dict[Lease, History] = {lease: {} for lease in leases}
    by_run = {(lease.org_id, lease.run_id): histories[lease] for lease in leases}
    if not leases:
        return histories
    async with database.duty("history") as con:
        rows = await con.fetch(
            _SQL["history"], [one.org_id for one in leases], [one.run_id for one in leases]
        )
    for row in rows:
        by_run[row["org_id"], row["run_id"]][row["step_key"]] = Recorded(
            kind=row["kind"],
            state=row["state"],
            output=row["output"],
            error=row["error"],
            tries=row["tries"],
            age_s=row["age_s"],
            is_due=not row["has_timer"],
        )
    return histories
