"""What claims read does not grow with what they changed, while somebody's transaction is open (decision 0046)."""

from __future__ import annotations

import uuid
from statistics import median
from typing import Any

import asyncpg
import orjson
from tests.engine.conftest import Pond
from tests.engine.test_kept_plans import WORKER

from millpond.engine.submit import submit

CLAIMS, FEW = 250, 20
CLAIM = "select * from claim_all(100, $1, gen_random_uuid(), '{default}', '{10}', '{10}', $2, '{0.001}', 11)"
CHARGE = "select charge_shares($1, '{default}', $2)"


async def _blocks(con: asyncpg.Connection[Any], statement: str, *args: object) -> int:
    """Execute a statement; returns how many blocks it touched."""
    told = await con.fetchval(f"explain (analyze, buffers, format json) {statement}", *args)
    plan = orjson.loads(told)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_claims_and_charges_touch_no_more_rows_beside_an_open_transaction(pond: Pond) -> None:
    worker_id, touched = uuid.uuid4(), list[tuple[int, int]]()
    con, open_one = [await asyncpg.connect(url) for url in (pond.urls.engine, pond.urls.owner)]
    try:
        await con.execute(WORKER, worker_id, '{"default": 10}', ["echo@1"])
        async with open_one.transaction(isolation="repeatable_read"):
            await open_one.fetchval("select pg_current_xact_id()")
            for n in range(CLAIMS):
                async with pond.db.org(pond.org_id) as app:
                    await submit(app, [pond.intent("echo", n)])
                claimed = await _blocks(con, CLAIM, worker_id, ["echo@1"])
                # By turns more was used than was charged, and less.
                used_s = 0.0005 if n % 2 else -0.0005
                touched.append((claimed, await _blocks(con, CHARGE, [pond.org_id], [used_s])))
        assert await pond.count("lease") == CLAIMS
    finally:
        await con.close()
        await open_one.close()
    claims, charges = zip(*touched, strict=True)
    for blocks in (claims, charges):
        assert median(blocks[-FEW:]) <= median(blocks[FEW : 2 * FEW]) + CLAIMS // 4, blocks
