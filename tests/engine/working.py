"""What worker processes of tests have in common: they are told where the database is, and work until SIGTERM.

Called by limited_process.py and tokens_process.py. Reads one JSON line {engine, lease_s, slots} on standard input;
started with the address of the database, the process executes one suspect alone.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import orjson

from millpond.db.pool import EngineDatabase
from millpond.engine.registry import Registry
from millpond.engine.worker import Worker


async def work(registry: Registry, module: str) -> None:
    """Work on a registry's flows and steps until SIGTERM; suspects are executed by `module`."""
    is_alone = len(sys.argv) > 1
    orders = {"engine": sys.argv[-1], "lease_s": 2.0, "slots": 1}
    if not is_alone:
        orders = orjson.loads(sys.stdin.readline())
    database = await EngineDatabase.connect(orders["engine"])
    worker = Worker(
        database=database,
        engine_url=orders["engine"],
        listen_url=orders["engine"],
        flows=list(registry.flows.values()),
        steps=list(registry.steps.values()),
        slots={"default": orders["slots"]},
        lease_s=orders["lease_s"],
        drain_s=2.0,
        alone=is_alone,
        alone_command=[sys.executable, "-m", module, orders["engine"]],
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()
