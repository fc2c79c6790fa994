"""Sessions: what the database knows of a worker, from its registration to its end.

Called by `worker`. Invariant: a session is one row, under an id of its own, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import orjson
import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.registry import Flow
from millpond.engine.spilling import Spill
from millpond.errors import MillpondError

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.worker")


async def publish(database: EngineDatabase, flows: Sequence[Flow]) -> None:
    """Tell the API which flows can be run."""
    async with database.duty("publish") as con:
        for flow in flows:
            await con.execute(
                _SQL["publish_flow"],
                flow.name,
                flow.version,
                flow.queue,
                flow.permission,
                flow.description,
                orjson.dumps(flow.input.json_schema()).decode(),
                orjson.dumps(flow.output.json_schema(mode="serialization")).decode(),
                flow.timeout_s,
                flow.deadline_s,
                orjson.dumps(dict(flow.needs)).decode(),
                list(flow.keys),
                flow.urgency,
            )


async def register(
    database: EngineDatabase,
    *,
    worker_id: uuid.UUID,
    served: Mapping[str, int],
    capabilities: Sequence[str],
    lease_s: float,
    labels: Mapping[str, str],
    spill: Spill | None,
) -> None:
    """Open a session for what a worker serves, and tell which of its slots help others."""
    async with database.duty("register") as con:
        await con.execute(
            _SQL["register_worker"],
            worker_id,
            socket.gethostname(),
            os.getpid(),
            orjson.dumps(served).decode(),
            capabilities,
            lease_s,
            version("millpond"),
            orjson.dumps(labels).decode(),
        )
        if spill:
            await con.execute(_SQL["tell_spill"], worker_id, orjson.dumps(spill).decode())


async def tell_drain(database: EngineDatabase, worker_id: uuid.UUID) -> None:
    """Tell that a worker takes no more work."""
    with contextlib.suppress(MillpondError):
        async with database.duty("drain") as con:
            await con.execute(_SQL["drain_worker"], worker_id)


async def close(
    database: EngineDatabase, worker_id: uuid.UUID, beat: asyncio.subprocess.Process
) -> None:
    """Close a session with its heartbeat, which ends as its standard input does."""
    if beat.stdin is not None:
        beat.stdin.close()
    with contextlib.suppress(MillpondError):
        async with database.duty("unregister") as con:
            await con.execute(_SQL["remove_worker"], worker_id)
    try:
        async with asyncio.timeout(5):
            await beat.wait()
    except TimeoutError:
        beat.kill()
        await beat.wait()
    _log.info("worker.stopped", worker_id=str(worker_id))
