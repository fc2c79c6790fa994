"""The list statements go by keys: a page costs what it shows, however many runs there are."""

from __future__ import annotations

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


async def touched(db: Database, org: int, statement: str, *arguments: Any) -> int:
    """Return how many rows of tables and indexes a statement reads, by EXPLAIN ANALYZE."""
    async with db.org(org) as con:
        text = await con.fetchval(
            f"explain (analyze, format json) {_SQL[statement]}", org, *arguments
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
