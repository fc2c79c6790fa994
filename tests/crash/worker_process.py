"""A worker in a process of its own that kills itself at a commit point.

Reads one JSON line {engine, sink, lease_s, slots} on standard input; MILLPOND_CRASH names where it ends,
as `before:park#2`: at the second passage of the point before the commit of `park`. SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import Counter

import orjson
import structlog
from tests.crash import elsewhere
from tests.crash import patterns as patterns
from tests.crash.flows import CHEST, REGISTRY, resources

from millpond.db.pool import EngineDatabase, Probe
from millpond.engine.retention import Keep
from millpond.engine.worker import Worker
from millpond.errors import Unavailable
from millpond.identity.current_rights import CurrentRights

# What is over for a week is deleted; keys and received events too.
KEEP = Keep(runs_s=7 * 86_400.0, keys_s=7 * 86_400.0, inbound_s=7 * 86_400.0)


def probe_of(order: str) -> Probe | None:
    """Return a probe that kills this process at the n-th passage of a point, none for no order."""
    if not order:
        return None
    point, _, passage = order.partition("#")
    passages: Counter[str] = Counter()

    async def probe(passed: str) -> None:
        passages[passed] += 1
        if passed == point and passages[passed] == int(passage):
            os.kill(os.getpid(), signal.SIGKILL)

    return probe


async def _connected(url: str, probe: Probe | None) -> EngineDatabase:
    """Connect, again while Postgres is being restarted."""
    while True:
        try:
            return await EngineDatabase.connect(url, probe=probe)
        except Unavailable:
            await asyncio.sleep(0.1)


async def main() -> None:
    """Work until SIGTERM or the end that was ordered."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # it tells of every lost connection
    orders = orjson.loads(sys.stdin.readline())
    probe = probe_of(os.environ.get("MILLPOND_CRASH", ""))
    database = await _connected(orders["engine"], probe)
    worker = Worker(
        database=database,
        engine_url=orders["engine"],
        listen_url=orders["engine"],
        flows=list(REGISTRY.flows.values()),
        slots={"default": orders["slots"], elsewhere.QUEUE: orders["slots"]},
        steps=list(REGISTRY.steps.values()),
        resources=resources(orders["sink"]),
        lease_s=orders["lease_s"],
        drain_s=0.3,
        keep=KEEP,
        rights=CurrentRights(database),
        vault=CHEST,
        # There are no suspects here; it is asked about them all the same.
        alone_command=[sys.executable, "-c", ""],
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await worker.run(stop)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
