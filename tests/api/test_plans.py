"""The list statements go by keys: a page costs what it shows, however many runs there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from millpond.db.pool import Database
from millpond.db.queries import queries

RUNS = 20_000
_SQL = queries("views")
LOWEST, HIGHEST = "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"
FILL = """
insert into run (org_id, run_id, flow, version, queue, subject, input, outcome, finished_at, attempts)
select $1::bigint, gen_random_uuid(), 'echo', 1, 'default', 'user:ann', '{}',
       case when n % 2 = 0 then 'succeeded' else 'failed' end, clock_timestamp(), 1
from generate_series(1, $2::int) n
"""


async def touched(
    db: Database, org: int, statement: str, *arguments: Any, room: Mapping[str, str] = _SQL
) -> int:
    """Return how many rows of tables and indexes a statement reads, by EXPLAIN ANALYZE."""
    async with db.org(org) as con:
        text = await con.fetchval(
            f"explain (analyze, format json) {room[statement]}", org, *arguments
        )
    return reads(orjson.loads(text)[0]["Plan"])


def reads(plan: dict[str, Any]) -> int:
    own = 0
    if "Relation Name" in plan:
        kept = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        own = round(kept * plan["Actual Loops"])
    return own + sum(reads(inner) for inner in plan.get("Plans", []))


async def test_pages_of_runs_read_what_they_show(db: Database, org: int, admin_url: str) -> None:
    import asyncpg

    admin = await asyncpg.connect(admin_url)
    await admin.execute("set search_path = millpond, public")
    await admin.execute(FILL, org, RUNS)
    await admin.execute("analyze run")
    middle = await admin.fetchval(
        "select run_id from run order by run_id offset $1 limit 1", RUNS // 2
    )
    await admin.close()
    for statement, states in (("run_page", []), ("finished_run_page", [["failed"]])):
        for below, above in ((HIGHEST, None), (middle, None), (HIGHEST, middle)):
            page = (below, above, None, None, None, None, None, None, 51, None, *states)
            assert await touched(db, org, statement, *page) <= 400, (statement, below, above)
    live = (HIGHEST, None, None, None, None, None, None, None, 51, None, ["queued", "running"])
    assert await touched(db, org, "live_run_page", *live) == 0


FILL_LINE = """
insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
select $1::bigint, n * 4, 'default', 'echo@1', '{}', 0, 0, true from generate_series(1, 20) n;
"""
FILL_READY = """
insert into ready (org_id, lane_id, rank, item_id)
select $1::bigint, 4 * (1 + n % 20), n, gen_random_uuid() from generate_series(1, $2::int) n
"""
FILL_ITEM = """
insert into item (org_id, item_id, run_id, state, lane_id, rank)
select $1::bigint, item_id, item_id, 'queued', lane_id, rank from ready
"""


async def test_a_look_at_queues_stops_at_its_cap(db: Database, org: int, admin_url: str) -> None:
    import asyncpg

    admin = await asyncpg.connect(admin_url)
    await admin.execute("set search_path = millpond, public")
    await admin.execute(FILL_LINE, org)
    await admin.execute(FILL_READY, org, RUNS)
    await admin.execute(FILL_ITEM, org)
    await admin.execute("analyze ready, item, lane, run")
    last = await admin.fetchrow("select lane_id, rank, item_id from ready order by rank desc")
    await admin.close()
    looks = queries("queues")
    assert await touched(db, org, "depths", 201, room=looks) <= 1000
    assert await touched(db, org, "resting", 201, room=looks) <= 1000
    ahead = (last["lane_id"], last["rank"], last["item_id"], 101)
    assert await touched(db, org, "ahead", *ahead, room=queries("why")) <= 400
