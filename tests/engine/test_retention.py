"""Retention: what is over for long goes, whole; what is live, young or a live run's child stays."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine import reruns
from millpond.engine.context import Context
from millpond.engine.reruns import Repeat
from millpond.engine.retention import BATCH, FIRST, LAST, Keep, Retention, first_id_at, prune_page
from millpond.errors import MillpondError, NotFound

DAY_S = 86_400.0
KEEP = Keep(runs_s=30 * DAY_S, keys_s=DAY_S, inbound_s=30 * DAY_S)
RUNS = """
insert into run (org_id, run_id, flow, version, queue, subject, input, outcome, finished_at, attempts, created_at)
  select $1::bigint, run_id, 'old', 1, 'default', 'user:ann', '1', $3,
         case when $3::text is not null then to_timestamp($4) end, 1, to_timestamp($5) from unnest($2::uuid[]) run_id
"""
FILL = (
    """
insert into event (org_id, run_id, event_no, kind)
  select $1::bigint, run_id, n, 'run.succeeded' from unnest($2::uuid[]) run_id, generate_series(1, 3) n
""",
    """
insert into step (org_id, run_id, step_key, name, kind, state, attempt, started_at)
  select $1::bigint, run_id, 's:' || n, 's', 'step', 'done', 1, clock_timestamp()
  from unnest($2::uuid[]) run_id, generate_series(1, 2) n
""",
    """
insert into payload (org_id, run_id, slot, body)
  select $1::bigint, run_id, 'step:s:1', '{}' from unnest($2::uuid[]) run_id
""",
    """
insert into signal (org_id, run_id, signal_id, name, sent_by)
  select $1::bigint, run_id, run_id, 'go', 'user:ann' from unnest($2::uuid[]) run_id
""",
    """
insert into run_use (org_id, run_id, use_id, keys, tokens)
  select $1::bigint, run_id, run_id, '{model:m}', 5 from unnest($2::uuid[]) run_id
""",
    """
insert into input_request (org_id, request_id, run_id, step_key, role, title, form, proposal, digest, state,
                           resolved_by)
  select $1::bigint, run_id, run_id, 'ask:0', 'support', '', '{}', '{}', '', 'resolved', 'user:ann'
  from unnest($2::uuid[]) run_id
""",
)
KEYS = """
insert into idempotency (org_id, subject, route, key, digest, run_id, created_at)
  select $1::bigint, 'user:ann', 'POST /v1/runs', run_id::text, '', run_id, to_timestamp($3)
  from unnest($2::uuid[]) run_id
"""
BELONGINGS = ("run", "event", "step", "payload", "signal", "input_request", "run_use")


async def fill(
    admin_url: str,
    org_id: int,
    count: int,
    *,
    age_s: float,
    finished_age_s: float | None = None,
    outcome: str | None = "succeeded",
) -> list[uuid.UUID]:
    """Make runs of an age with everything that a run can have; returns their ids, oldest first."""
    made_s = time.time() - age_s
    finished_s = time.time() - (age_s if finished_age_s is None else finished_age_s)
    ids = [
        uuid.UUID(int=first_id_at(made_s + n).int | uuid.uuid4().int >> 60) for n in range(count)
    ]
    admin = await asyncpg.connect(admin_url)
    await admin.execute("set search_path = millpond")
    await admin.execute(RUNS, org_id, ids, outcome, finished_s, made_s)
    for statement in FILL:
        await admin.execute(statement, org_id, ids)
    await admin.execute(KEYS, org_id, ids, made_s)
    await admin.close()
    return ids


async def counts(pond: Pond, where: str = "true") -> dict[str, int]:
    return {table: await pond.count(table, where) for table in BELONGINGS}


async def swept(pond: Pond, keep: Keep = KEEP) -> Retention:
    """Sweep until a pass over all orgs is done."""
    retention = Retention(pond.engine_db, keep)
    async with asyncio.timeout(DEADLINE_S):
        while await retention.sweep() < 10:
            pass
    return retention


async def test_old_finished_runs_go_with_all_that_belongs_to_them(
    pond: Pond, admin_url: str
) -> None:
    await fill(admin_url, pond.org_id, 30, age_s=40 * DAY_S)
    await fill(admin_url, pond.org_id, 7, age_s=20 * DAY_S)
    await swept(pond)
    assert await counts(pond) == {
        "run": 7,
        "event": 21,
        "step": 14,
        "payload": 7,
        "signal": 7,
        "input_request": 7,
        "run_use": 7,
    }
    # Keys are older than a day in both.
    assert await pond.count("idempotency") == 0


async def test_live_runs_and_those_that_ended_lately_stay(pond: Pond, admin_url: str) -> None:
    live = await fill(admin_url, pond.org_id, 3, age_s=50 * DAY_S, outcome=None)
    late = await fill(admin_url, pond.org_id, 4, age_s=40 * DAY_S, finished_age_s=DAY_S)
    await fill(admin_url, pond.org_id, 5, age_s=35 * DAY_S)
    await swept(pond)
    async with pond.engine_db.duty("test") as con:
        kept = {row["run_id"] for row in await con.fetch("select run_id from run")}
    assert kept == {*live, *late}


async def test_children_of_live_runs_stay(pond: Pond, admin_url: str) -> None:
    async def rest(ctx: Context, n: int) -> None:
        await ctx.sleep(600, name="long")

    parent = await pond.submit(pond.flow(rest), 1)
    child, orphan = await fill(admin_url, pond.org_id, 2, age_s=40 * DAY_S)
    admin = await asyncpg.connect(admin_url)
    adopt = (
        "update millpond.run set parent_id = $1, parent_key = 'c:0', close_policy = 'wait'"
        " where run_id = $2"
    )
    await admin.execute(adopt, parent, child)
    await admin.execute(adopt, uuid.uuid4(), orphan)
    await admin.close()
    await swept(pond)
    async with pond.engine_db.duty("test") as con:
        kept = {row["run_id"] for row in await con.fetch("select run_id from run")}
    assert kept == {parent, child}


async def test_many_batches_over_orgs_end_a_pass_and_the_next_is_an_hour_later(
    pond: Pond, other_org: int, admin_url: str
) -> None:
    await fill(admin_url, pond.org_id, 2 * BATCH + 10, age_s=40 * DAY_S)
    await fill(admin_url, other_org, BATCH + 1, age_s=40 * DAY_S)
    retention = await swept(pond)
    assert await pond.count("run") == 0
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select org_id, cursor_id from retention order by org_id")
    assert [tuple(row) for row in rows] == [(pond.org_id, LAST), (other_org, LAST)]
    # Nothing is due, until the pass is an hour old.
    await fill(admin_url, other_org, 1, age_s=41 * DAY_S)
    while await retention.sweep() < 10:
        pass
    assert await pond.count("run") == 1
    async with pond.engine_db.duty("test") as con:
        await con.execute("update retention set pass_began_at = pass_began_at - interval '61 min'")
    while await retention.sweep() < 10:
        pass
    assert await pond.count("run") == 0


async def test_a_pass_goes_on_where_another_process_left_it(pond: Pond, admin_url: str) -> None:
    ids = await fill(admin_url, pond.org_id, BATCH + 5, age_s=40 * DAY_S)
    first = Retention(pond.engine_db, KEEP)
    while await pond.count("run") > 5:
        await first.sweep()
    async with pond.engine_db.duty("test") as con:
        assert await con.fetchval("select cursor_id from retention") == ids[BATCH - 1]
    await swept(pond)
    assert await pond.count("run") == 0


async def test_only_one_process_prunes(pond: Pond, admin_url: str) -> None:
    await fill(admin_url, pond.org_id, 3, age_s=40 * DAY_S)
    other = Retention(pond.engine_db, KEEP)
    async with pond.engine_db.duty("test") as con:
        await con.execute("select pg_advisory_xact_lock(7741003)")
        assert await other.sweep() > 10
        assert await pond.count("run") == 3
    await swept(pond)
    assert await pond.count("run") == 0


async def test_runs_are_kept_for_ever_when_so_set_but_keys_are_not(
    pond: Pond, admin_url: str
) -> None:
    await fill(admin_url, pond.org_id, 3, age_s=400 * DAY_S)
    await swept(pond, Keep(runs_s=None, keys_s=DAY_S, inbound_s=DAY_S))
    assert await pond.count("run") == 3
    assert await pond.count("idempotency") == 0


@pytest.mark.parametrize("keys_s", [DAY_S, 90 * DAY_S])
async def test_a_key_goes_at_the_latest_with_its_run(
    pond: Pond, admin_url: str, keys_s: float
) -> None:
    await fill(admin_url, pond.org_id, 3, age_s=40 * DAY_S)
    await fill(admin_url, pond.org_id, 2, age_s=0.1 * DAY_S)
    await swept(pond, Keep(runs_s=30 * DAY_S, keys_s=keys_s, inbound_s=DAY_S))
    assert await pond.count("idempotency") == 2
    assert await pond.count("run") == 2


async def test_received_events_go_by_their_age(pond: Pond, admin_url: str) -> None:
    admin = await asyncpg.connect(admin_url)
    await admin.execute(
        "insert into millpond.inbound_event (org_id, event_id, name, data, sent_by, received_at)"
        " select $1, n::text, 'order.paid', '{}', 'user:ann', clock_timestamp() - n * interval '1 day'"
        " from generate_series(1, 40) n",
        pond.org_id,
    )
    await admin.close()
    await swept(pond)
    assert await pond.count("inbound_event") == 29


async def test_a_dry_run_counts_and_deletes_nothing(pond: Pond, admin_url: str) -> None:
    await fill(admin_url, pond.org_id, 12, age_s=40 * DAY_S)
    async with pond.engine_db.duty("test") as con:
        options: Mapping[str, Any] = {"now_s": time.time(), "older_than_s": 30 * DAY_S}
        page = await prune_page(con, pond.org_id, FIRST, limit=10, dry_run=True, **options)
        assert (page.runs, page.has_more) == (10, True)
        rest = await prune_page(con, pond.org_id, page.cursor, limit=10, dry_run=True, **options)
        assert (rest.runs, rest.has_more) == (2, False)
    assert await pond.count("run") == 12


async def test_work_goes_on_while_a_worker_prunes(pond: Pond, admin_url: str) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    await fill(admin_url, pond.org_id, 3 * BATCH, age_s=40 * DAY_S)
    async with pond.worker(keep=KEEP):
        ids = [await pond.submit(flow, n) for n in range(50)]
        for run_id in ids:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        async with asyncio.timeout(DEADLINE_S):
            while await pond.count("run") > 50:
                await asyncio.sleep(0.05)
    assert (await counts(pond))["event"] == 150


async def test_a_run_that_is_being_repeated_is_not_deleted_meanwhile(
    pond: Pond, admin_url: str
) -> None:
    (run_id,) = await fill(admin_url, pond.org_id, 1, age_s=40 * DAY_S)
    now_s = time.time()
    async with pond.db.org(pond.org_id) as con:
        source = await reruns.read(con, pond.org_id, run_id)
        repeat = Repeat(version=1, timeout_s=None, subject="user:ann", input="1", keeps_all=True)
        assert await reruns.copy(con, source, repeat, uuid.uuid4()) == 2
        with pytest.raises(MillpondError):
            async with pond.engine_db.duty("test") as other:
                await other.execute("set local lock_timeout = '100ms'")
                await prune_page(other, pond.org_id, FIRST, now_s=now_s, older_than_s=30 * DAY_S)
    await swept(pond)
    async with pond.db.org(pond.org_id) as con:
        with pytest.raises(NotFound):
            await reruns.copy(con, source, repeat, uuid.uuid4())
