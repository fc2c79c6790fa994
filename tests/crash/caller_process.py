"""A caller in a process of its own that kills itself at the commit of what it asks for.

Reads one JSON line {app, org_id, act, run_id, request_id, intent} on standard input and prints `done` when it was
acknowledged; MILLPOND_CRASH names where it ends, as in worker_process.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid

import orjson
from tests.crash.worker_process import probe_of
from tests.crash.workload import HUMAN, intent

from millpond.db.pool import Database
from millpond.engine.operations import cancel
from millpond.engine.questions import resolve
from millpond.engine.submit import submit


async def main() -> None:
    """Do what is asked in one transaction."""
    orders = orjson.loads(sys.stdin.readline())
    org_id, run_id = orders["org_id"], uuid.UUID(orders["run_id"])
    probe = probe_of(os.environ.get("MILLPOND_CRASH", ""))
    database = await Database.connect(orders["app"], probe=probe)
    async with database.org(org_id) as con:
        if orders["act"] == "submit":
            await submit(con, [intent(org_id, "crash.steps", run_id=run_id)])
        elif orders["act"] == "cancel":
            await cancel(con, org_id, run_id, HUMAN.subject)
        else:
            request_id = uuid.UUID(orders["request_id"])
            await resolve(con, org_id, request_id, HUMAN, answer={"approved": True})
    print("done", flush=True)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main())
