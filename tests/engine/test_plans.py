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

# By room. Left out: those of the claim and the submit, whose functions test_kept_plans.py follows; reads of the API and
# what people change, which come with few rows or are planned for their parameters; what reads on purpose whole what is
# small (all leases, workers, limits, brakes), or indexes in their order (rooms, crossings, lanes that wait); and those
# that go by another index of the org's as well as by their key where a table is empty
# (received events, schedules, triggers).
HOT = {
    (room, name)
    for room, names in {
        "blocking": "block block_step lock_blocked unblock",
        "claim": "take",
        "children": "basis record_children record_joins last_of_chains joined lineage hand_on",
        "commit": "record record_done record_done_together finish finish_with_last finish_with_duties "
        "lock_live hold hold_free",
        "crossings": "weights",
        "deadlines": "due lock take sweep tell end is_overdue",
        "dedup": "holders free_orphan free",
        "endings": "drop_waits free_keys lock_parents end_joins cancel_children with_parent",
        "events": "append last",
        "limiting": "forget",
        "maintenance": "unlease",
        "metering": "spend",
        "needs": "riders seat call run stand leave end_lines waiting",
        "operations": "lock_live outcome request_cancel unqueue end_live end_run",
        "payloads": "keep read",
        "quarantine": "fail_poisoned",
        "remote": "hold_run send orders hold lock_runs lock_free_runs live_runs places settle rest tell_lost drop stop",
        "reservations": "reserve",
        "retention": "page drop_runs drop_keys drop_inbound",
        "schedules": "known_runs",
        "inbound": "keep_groups end_groups park_groups",
        "signals": "ended take waits",
        "throttling": "carried holds",
        "waits": "can_go unlease rest rest_all clear_suspect ready due lock_items take_timers sweep_timers end_sleeps "
        "end_signal_waits lock_run end_wait drop_timer history retrying_s",
        "waking": "over",
    }.items()
    for name in names.split()
}
# Those that read an index in its order, and stop early.
BY_ORDER = {("waits", "due"), ("deadlines", "due")}
BY_ORDER |= {("retention", "page")}
# The claim reads whole what it consumes whole; its tables hold what has just arrived.
WHOLE = {"arrival"}
TABLES = {"run", "item", "ready", "lease", "lane", "share", "step", "event", "timer", "arrival"}
TABLES |= {
    "payload",
    "signal",
    "input_request",
    "idempotency",
    "inbound_event",
    "delta",
    "live_key",
}
TABLES |= {"step_lease", "step_need", "reservation", "trigger", "trigger_group", "schedule"}
# What an index binds first, by name; the rest of it is bound without a gap.
INDEXES = """
select c.relname as index, array_agg(pg_get_indexdef(c.oid, k, true) order by k) as columns
from pg_index x join pg_class c on c.oid = x.indexrelid join pg_class t on t.oid = x.indrelid
cross join generate_series(1, x.indnkeyatts) as k
where t.relnamespace = 'millpond'::regnamespace group by c.relname
"""


async def vacuum(pond: Pond) -> None:
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


def _is_by_key(node: dict[str, Any], columns: list[str]) -> bool:
    """Whether a scan binds the first columns of its index, and more than the org where there are more."""
    if node["Node Type"] == "Bitmap Heap Scan":
        return True
    condition = node.get("Index Cond", "")
    bound = [re.search(rf"\b{re.escape(one)} (=|<|>|IS)", condition) is not None for one in columns]
    first = bound.index(False) if False in bound else len(bound)
    return first > (columns[0] == "org_id" and len(columns) > 1) and True not in bound[first:]


@pytest.mark.parametrize("rows", [0, 1, 3000])
async def test_hot_statements_go_by_key(pond: Pond, rows: int) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow = pond.flow(idle)
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent(flow, n) for n in range(rows)])
    if not rows:
        await vacuum(pond)
    found = []
    async with pond.engine_db.duty("explain") as con:
        indexes = {row["index"]: row["columns"] for row in await con.fetch(INDEXES)}
        for room, name in sorted(HOT):
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
                index = node.get("Index Name", "")
                if node["Node Type"] != "Bitmap Index Scan":
                    table = node.get("Relation Name")
                    if table not in TABLES - WHOLE or not node["Node Type"].endswith("Scan"):
                        continue
                if (room, name) not in BY_ORDER and not _is_by_key(node, indexes.get(index, [""])):
                    found.append(
                        f"{room}.{name}: {node['Node Type']} {index} {node.get('Index Cond')}"
                    )
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
    assert [len(row["items"] or ()) for row in rows] == [0, 16, 0]
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
            100, worker_id, uuid.uuid4(), ["default"], [slots], [10], [flow.capability], [1.0], 64, 0,
        )  # fmt: skip
        read = await con.fetch(
            "select relname, seq_scan, coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables"
        )
    assert (told["attempt"], len(rows)) == ((1, 60) if slots > 60 else (0, 0))
    scans = {row["relname"]: row["seq_scan"] for row in read}
    tables = ("lane", "share", "ready", "worker", "item", "lease", "run")
    assert not {table for table in tables if scans.get(table)}
    assert (
        sum(row["rows"] for row in read if row["relname"] == "ready") <= 2 * 60 + 2
    )  # two by the short way, in vain


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
