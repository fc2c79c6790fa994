"""Minutes of work while workers are killed at random moments: nothing is lost, nothing repeated.

`make soak` runs it for five minutes; `MILLPOND_SOAK_S` names another length.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import uuid
from pathlib import Path

import pytest

from millpond.engine.submit import submit
from millpond.types import Intent

pytestmark = pytest.mark.soak
LENGTH_S = float(os.environ.get("MILLPOND_SOAK_S", "300"))
PROGRAM = Path(__file__).with_name("worker_process.py")
# What a killed worker held is rescued after its lease, and its runs take a few seconds.
LAST_S = 60.0


async def start_worker(url: str) -> asyncio.subprocess.Process:
    environment = {**os.environ, "SOAK_ENGINE_URL": url}
    return await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), env=environment)


async def end(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.wait()


async def keep_killing(url: str, until: float) -> int:
    """Have two workers and kill one of them every few seconds; two live ones are left."""
    workers = [await start_worker(url), await start_worker(url)]
    killed = 0
    try:
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(2.0, 8.0))
            await end(workers.pop(random.randrange(len(workers))))
            killed += 1
            workers.append(await start_worker(url))
        await asyncio.sleep(LAST_S)
    finally:
        for worker in workers:
            await end(worker)
    return killed


async def keep_submitting(db, org: int, until: float) -> list[uuid.UUID]:
    """Submit about thirty runs a second."""
    runs: list[uuid.UUID] = []
    while time.monotonic() < until:
        intents = [
            Intent(
                org_id=org,
                flow="soak.walk",
                version=1,
                queue="default",
                input=b"%d" % (len(runs) + n),
                subject="user:soak",
            )
            for n in range(3)
        ]
        async with db.org(org) as con:
            runs += await submit(con, intents)
        await asyncio.sleep(0.1)
    return runs


async def test_every_run_ends_once_and_no_step_is_recorded_twice(urls, db, org):
    until = time.monotonic() + LENGTH_S
    runs, killed = await asyncio.gather(
        keep_submitting(db, org, until), keep_killing(urls.engine, until)
    )
    assert killed >= LENGTH_S / 10
    async with db.org(org) as con:
        ended = await con.fetch(
            "select run_id, input::text as input, output::text as output from run"
            " where org_id = $1 and outcome = 'succeeded'",
            org,
        )
        left = await con.fetchval("select count(*) from item where org_id = $1", org)
        leases = await con.fetchval("select count(*) from lease where org_id = $1", org)
        repeated = await con.fetchval(
            "select count(*) from (select from event where org_id = $1 and kind = 'step.succeeded'"
            " group by run_id, step_key having count(*) > 1) as twice",
            org,
        )
        finals = await con.fetchval(
            "select count(*) from event where org_id = $1 and kind = 'run.succeeded'", org
        )
        gaps = await con.fetchval(
            "select count(*) from (select from event where org_id = $1 group by run_id"
            " having max(event_no) <> count(*)) as gap",
            org,
        )
        rescued = await con.fetchval(
            "select count(*) from event where org_id = $1 and kind = 'run.rescued'", org
        )
    assert {row["run_id"] for row in ended} == set(runs)
    assert all(row["input"] == row["output"] for row in ended)
    assert (left, leases, repeated, finals, gaps) == (0, 0, 0, len(runs), 0)
    assert rescued > 0
