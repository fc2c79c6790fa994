"""What claims read does not grow with what they changed, while somebody's transaction is open (decision 0046)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import asyncpg
import orjson
import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand
from tests.engine.test_kept_plans import WORKER
from tests.property.pond_checks import check_order

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.submit import submit

CLAIMS, FEW = 250, 20
AT_ONCE = "select * from claim_at_once(100, $1, gen_random_uuid(), '{default}', '{10}', '{10}', $2, '{0.001}', 11, 0)"
CHARGE = "select charge_shares(array[$1::bigint], '{default}', array[$2::float8])"


@asynccontextmanager
async def _open_transaction(pond: Pond) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Hold one open, and lend a session of the engine."""
    con, idle = [await asyncpg.connect(url) for url in (pond.urls.engine, pond.urls.owner)]
    try:
        async with idle.transaction(isolation="repeatable_read"):
            await idle.fetchval("select pg_current_xact_id()")
            yield con
    finally:
        await con.close()
        await idle.close()


async def _blocks(con: asyncpg.Connection[Any], statement: str, *args: object) -> int:
    """Execute a statement; returns how many blocks it touched."""
    told = await con.fetchval(f"explain (analyze, buffers, format json) {statement}", *args)
    plan = orjson.loads(told)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def _hold(blocks: list[int]) -> None:
    """Raise where the last took much more than the first, after what a session does only once."""
    assert median(blocks[-FEW:]) <= median(blocks[FEW : 2 * FEW]) + CLAIMS // 10, blocks


async def _submit(pond: Pond, count: int, org_id: int | None = None) -> None:
    org_id = org_id or pond.org_id
    async with pond.db.org(org_id) as con:
        await submit(con, [pond.intent("echo", n, org_id=org_id) for n in range(count)])


async def test_one_run_at_a_time(pond: Pond) -> None:
    worker_id = uuid.uuid4()
    claims, charges = list[int](), list[int]()
    async with _open_transaction(pond) as con:
        await con.execute(WORKER, worker_id, '{"default": 10}', ["echo@1"])
        for n in range(CLAIMS):
            await _submit(pond, 1)
            claims.append(await _blocks(con, AT_ONCE, worker_id, ["echo@1"]))
            # By turns more was used than was charged, and less.
            used_s = 0.0005 if n % 2 else -0.0005
            charges.append(await _blocks(con, CHARGE, pond.org_id, used_s))
    assert await pond.count("lease") == CLAIMS
    _hold(claims)
    _hold(charges)


async def test_claims_from_a_backlog(pond: Pond, other_org: int) -> None:
    hand = await Hand.register(pond, estimate_s=lambda _: 0.001)
    heads, takes = list[int](), list[int]()
    for org_id in (pond.org_id, other_org):
        await _submit(pond, CLAIMS, org_id)
    sql = queries("claim")
    async with _open_transaction(pond) as con:
        for _ in range(CLAIMS):
            assert len(await hand.claim({"default": 1})) == 1
            transaction = con.transaction()
            await transaction.start()
            asked = (100, hand.worker_id, ["default"], [10], ["echo@1"], 4)
            heads.append(await _blocks(con, sql["heads"], *asked))
            one = (await con.fetch(sql["heads"], *asked))[1]
            lane = [str(one["org_id"]), str(one["lane_id"])]
            takes.append(
                await _blocks(
                    con,
                    sql["take"],
                    *(*lane, str(one["ranks"][0]), str(one["items"][0])),
                    *(hand.worker_id, uuid.uuid4()),
                    *(*lane, str(one["ranks"][1]), "true"),
                    *(lane[0], "default", str(one["virtual_s"] + 0.001), "false"),
                    *(["default"], [one["virtual_s"]]),
                )
            )
            await transaction.rollback()
    _hold(heads)
    _hold(takes)


@pytest.mark.parametrize("estimate_s", [0.1, 0.3, 0.7, 1.1, 5.0])
async def test_an_org_whose_work_somebody_held_locked_is_not_read_past(
    pond: Pond, other_org: int, engine_db: EngineDatabase, estimate_s: float
) -> None:
    """It is given back what it was charged for, which rounding may make less than nothing."""
    hand = await Hand.register(pond, estimate_s=lambda _: estimate_s)
    await _submit(pond, 1)
    await _submit(pond, 1, other_org)
    assert len(await hand.claim()) == 2
    for count in (1, 2, 3, 8):
        await _submit(pond, count)
        async with engine_db.duty("test") as con:
            await con.execute("select from item where state = 'queued' for update")
            await _submit(pond, 1, other_org)
            await hand.soon()
            assert await pond.count("ready") == count
        async with engine_db.duty("test") as con:
            await check_order(con)
        await hand.soon()
        assert await pond.count("ready") == 0
