"""Queues and workers: how much waits, and who is there to do it.

Called by the API inside an org transaction. Invariants: it only reads; counts stop at a cap, so that a
look costs the same whatever the backlog is; workers belong to no org.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.views import served_queues
from millpond.types import Json, RunState

_SQL = queries("queues")
MAX_DEPTH = 10_000
_MAX_LIVE_ROWS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueView:
    """A queue as one org sees it; `workers` and `slots` are those of all live workers.

    `oldest_s` is how long the oldest queued work item has been ready. Without `is_depth_exact` at
    least `queued` wait; without `is_rest_exact` at least so many are scheduled or wait.
    """

    name: str
    queued: int
    is_depth_exact: bool
    oldest_s: float | None
    running: int
    scheduled: int
    waiting: int
    awaiting_input: int
    is_rest_exact: bool
    workers: int
    slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """A live worker process; `queues` and `in_use` are slots by queue, the latter a second old at most.

    `spill` says whom idle ones help (`helps`), and which are kept (`keep`) and reserved (`reserve`), as `Spill` does.
    """

    worker_id: uuid.UUID
    host: str
    pid: int
    release: str
    queues: Mapping[str, int]
    in_use: Mapping[str, int]
    spill: Mapping[str, Any]
    labels: Json
    flows: list[str]
    started_at: datetime
    heartbeat_age_s: float
    is_draining: bool


async def list_queues(con: Connection, org_id: int) -> list[QueueView]:
    """Return queues with the org's own work in each, by name."""
    served = await served_queues(con)
    depths = {row["queue"]: row for row in await con.fetch(_SQL["depths"], org_id, MAX_DEPTH + 1)}
    running = {row["queue"]: row["items"] for row in await con.fetch(_SQL["running"], org_id)}
    rows = await con.fetch(_SQL["resting"], org_id, _MAX_LIVE_ROWS + 1)
    is_rest_exact = not rows or rows[0]["looked_at"] <= _MAX_LIVE_ROWS
    resting = {(row["queue"], row["state"]): int(row["items"]) for row in rows if row["queue"]}
    waiting = {queue for queue, row in depths.items() if row["depth"]}

    def view(name: str) -> QueueView:
        workers, slots = served.get(name, (0, 0))
        depth = depths[name]["depth"] if name in depths else 0
        return QueueView(
            name=name,
            queued=min(depth, MAX_DEPTH),
            is_depth_exact=depth <= MAX_DEPTH,
            oldest_s=depths[name]["oldest_s"] if depth else None,
            running=running.get(name, 0),
            scheduled=resting.get((name, RunState.SCHEDULED), 0),
            waiting=resting.get((name, RunState.WAITING), 0),
            awaiting_input=resting.get((name, RunState.AWAITING_INPUT), 0),
            is_rest_exact=is_rest_exact,
            workers=workers,
            slots=slots,
        )

    names = {*served, *waiting, *running, *(queue for queue, _ in resting)}
    return [view(name) for name in sorted(names)]


async def list_workers(con: Connection) -> list[WorkerView]:
    """Return the live workers of the installation, oldest first."""
    return [
        WorkerView(
            worker_id=row["worker_id"],
            host=row["host"],
            pid=row["pid"],
            release=row["release"],
            queues=orjson.loads(row["queues"]),
            in_use=orjson.loads(row["in_use"]),
            spill=orjson.loads(row["spill"]),
            labels=orjson.loads(row["labels"]),
            flows=sorted(row["capabilities"]),
            started_at=row["started_at"],
            heartbeat_age_s=row["heartbeat_age_s"],
            is_draining=row["is_draining"],
        )
        for row in await con.fetch(_SQL["workers"])
    ]
