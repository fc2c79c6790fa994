"""Plans of the hot statements: by key, whatever the tables' sizes were when the plan was made."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import asyncpg
import orjson
import pytest
from tests.engine.conftest import Pond

from millpond.db.queries import queries

HOT = {
    ("commit", "record"),
    ("commit", "finish"),
    ("commit", "hold"),
    ("waits", "ready"),
    ("waits", "rest"),
    ("waits", "can_go"),
    ("waits", "history"),
    ("waking", "over"),
    ("waits", "due"),
    ("waits", "next_due"),
    ("waits", "lock_items"),
    ("waits", "take_timers"),
    ("events", "append"),
    ("children", "basis"),
    ("children", "known"),
    ("children", "last_of_chain"),
    ("endings", "lock_parents"),
    ("endings", "end_joins"),
    ("endings", "cancel_children"),
    ("endings", "with_parent"),
    ("signals", "take"),
    ("signals", "waits"),
    ("waits", "end_signal_waits"),
    ("retention", "page"),
    ("retention", "drop_runs"),
    ("retention", "drop_keys"),
    ("retention", "drop_inbound"),
    ("quarantine", "fail_poisoned"),
    ("quarantine", "suspects_wait"),
    ("deadlines", "due"),
    ("deadlines", "lock"),
    ("deadlines", "take"),
    ("deadlines", "tell"),
    ("deadlines", "end"),
    ("remote", "hold_run"),
    ("remote", "send"),
    ("remote", "orders"),
    ("remote", "hold"),
    ("remote", "lock_runs"),
    ("remote", "settle"),
    ("remote", "stop"),
    ("payloads", "keep"),
    ("payloads", "read"),
}
# Those that go by key also where the planner takes every table for empty.
AT_ANY_SIZE = {("commit", "record"), ("commit", "finish"), ("commit", "hold")}
# The claim reads whole what it consumes whole; its tables hold what has just arrived.
WHOLE = {"arrival"}
TABLES = {"run", "item", "ready", "lease", "lane", "share", "step", "event", "timer", "arrival"}
TABLES |= {"payload", "signal", "input_request", "idempotency", "inbound_event"}


async def _vacuum(pond: Pond) -> None:
    """Let the planner think that there is one row at most of everything."""
    con = await asyncpg.connect(pond.urls.owner)
    try:
        for table in sorted(TABLES):
            await con.execute(f"vacuum (analyze) millpond.{table}")
    finally:
        await con.close()


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


@pytest.mark.parametrize("rows", [0, 1, 3000])
async def test_hot_statements_go_by_key(pond: Pond, rows: int) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow = pond.flow(idle)
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent(flow, n) for n in range(rows)])
    if not rows:
        await _vacuum(pond)
    found = []
    async with pond.engine_db.duty("explain") as con:
        for room, name in sorted(HOT if rows else HOT & AT_ANY_SIZE):
            statement = queries(room)[name]
            await con.execute(f"prepare hot as {statement}")
            nulls = ", ".join(
                ["null"] * max(map(int, re.findall(r"\$(\d+)", statement)), default=0)
            )
            text = await con.fetchval(
                f"explain (format json) execute hot{f'({nulls})' if nulls else ''}"
            )
            await con.execute("deallocate hot")
            for node in _nodes(orjson.loads(text)[0]["Plan"]):
                table = node.get("Relation Name")
                if table not in TABLES - WHOLE or not node["Node Type"].endswith("Scan"):
                    continue
                by_order = name in ("due", "next_due")
                if "Index Cond" not in node and not by_order:
                    found.append(f"{room}.{name}: {node['Node Type']} on {table}")
    assert found == []


async def test_a_claim_reads_the_heads_of_lanes_and_not_what_stands_behind(pond: Pond) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow = pond.flow(idle)
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent(flow, n) for n in range(3000)])
    async with pond.engine_db.duty("explain") as con:
        rows = await con.fetch(
            queries("claim")["heads"], 100, uuid.uuid4(), ["default"], [10], [flow.capability], 16
        )
        read = await con.fetch(
            "select relname, seq_scan, coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables"
        )
    assert [len(row["items"] or ()) for row in rows] == [0, 16]
    scans = {row["relname"]: row["seq_scan"] for row in read}
    assert not {table for table in ("lane", "share", "ready", "worker") if scans.get(table)}
    assert sum(row["rows"] for row in read if row["relname"] == "ready") <= 16


@pytest.mark.parametrize("slots", [10, 3000])
async def test_a_claim_at_once_moves_all_by_key_or_reads_little_in_vain(
    pond: Pond, slots: int
) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow, worker_id = pond.flow(idle), uuid.uuid4()
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent(flow, n) for n in range(60)])
    async with pond.engine_db.duty("register") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            worker_id, "here", 1, "{}", [flow.capability], 30.0, "0", "{}",
        )  # fmt: skip
    async with pond.engine_db.duty("explain") as con:
        told, *rows = await con.fetch(
            queries("claim")["at_once"],
            100, worker_id, uuid.uuid4(), ["default"], [slots], [10], [flow.capability], [1.0], 64,
        )  # fmt: skip
        read = await con.fetch(
            "select relname, seq_scan, coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables"
        )
    assert (told["attempt"], len(rows)) == ((1, 60) if slots > 60 else (0, 0))
    scans = {row["relname"]: row["seq_scan"] for row in read}
    tables = ("lane", "share", "ready", "worker", "item", "lease", "run")
    assert not {table for table in tables if scans.get(table)}
    assert sum(row["rows"] for row in read if row["relname"] == "ready") <= 2 * 60


async def test_runs_that_end_together_stay_on_their_pages(pond: Pond) -> None:
    """Else each that moves would be entered anew in every index."""

    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow, places = pond.flow(idle), "select run_id, ctid::text as place from run"
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        run_ids = await submit(con, [pond.intent(flow, "x" * 200) for _ in range(100)])
    async with pond.engine_db.duty("test") as con:
        before = {row["run_id"]: row["place"] for row in await con.fetch(places)}
        await con.execute(
            "update run set outcome = 'succeeded', output = 'null', attempts = 1, started_at = created_at, "
            "finished_at = clock_timestamp()"
        )
        after = {row["run_id"]: row["place"] for row in await con.fetch(places)}
    assert set(before) == set(after) == set(run_ids)
    moved = [one for one in run_ids if before[one].split(",")[0] != after[one].split(",")[0]]
    assert moved == []
