"""Poison: a run that also took the process down that had it alone is failed.

Called by maintenance in the transaction of a rescue. Invariants: only a run that was executed alone is
called poison; it ends by the same path as any other, with its lease, its outcome and its final event in
one transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime

import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.duties import Duty
from millpond.engine.endings import Ended, see_to
from millpond.engine.lanes import SUSPECT_DEATHS
from millpond.engine.waits import Readied
from millpond.types import Json, RunState

_SQL = queries("quarantine")
CODE = "poison"


def is_poison(row: Record) -> bool:
    """Whether a lost lease was that of a run which its worker had alone.

    Runs only: a step in another queue ends as its run decides.
    """
    return bool(row["kind"] == "run" and row["deaths"] >= SUSPECT_DEATHS)


def _error(deaths: int) -> dict[str, Json]:
    return {
        "class": "Poison",
        "code": CODE,
        "message": f"its worker died {deaths} times, the last time with this run alone in the process",
        "advice": "see the worker's log of that time (memory, native code); "
        "`millpond runs release` tries it again from its recorded steps",
    }


async def fail(
    con: Connection, lost: Sequence[Record], heard_at: Mapping[uuid.UUID, datetime]
) -> list[Readied]:
    """End poisoned runs whose live rows are locked; returns other runs that may go on by it."""
    if not lost:
        return []
    rows = await con.fetch(
        _SQL["fail_poisoned"],
        [row["org_id"] for row in lost],
        [row["item_id"] for row in lost],
        [row["token"] for row in lost],
        [orjson.dumps(_error(row["deaths"] + 1)).decode() for row in lost],
        [heard_at.get(row["worker_id"]) for row in lost],
    )
    ended = [
        Ended(
            org_id=row["org_id"],
            run_id=row["run_id"],
            duties=Duty(row["duties"]),
            outcome=RunState.FAILED,
        )
        for row in rows
    ]
    return await see_to(con, ended)
