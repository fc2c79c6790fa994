"""Plans that a session made over empty tables, and keeps, read no more of full ones than a batch needs."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson
from tests.engine.conftest import Pond
from tests.engine.test_plans import TABLES, vacuum

from millpond.db.queries import queries
from millpond.engine.submit import submit

ROWS, BATCH = 3000, 20
# Each row of a batch is looked up in a table a few times at most.
MOST = 8 * BATCH
READ = "select relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables"
# Half of the items run, each with a step and a timer; half are ready. Each stands in a lane and a queue of its own.
FILL = """
delete from arrival; delete from ready;
create temporary table n as
  select org_id, run_id, row_number() over (order by run_id) as n, gen_random_uuid() as token from item;
update item i set lane_id = n.n * 4, rank = n.n, attempt = (n.n % 2)::int, event_no = 1,
  state = case when n.n % 2 = 1 then 'running' else 'queued' end, token = case when n.n % 2 = 1 then n.token end
from n where i.org_id = n.org_id and i.item_id = n.run_id;
insert into ready (org_id, lane_id, rank, item_id) select org_id, n * 4, n, run_id from n where n % 2 = 0;
insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
  select org_id, run_id, run_id, n * 4, 'q' || n, '{}', gen_random_uuid(), 1, token from n where n % 2 = 1;
insert into step (org_id, run_id, step_key, name, kind, state, attempt, started_at)
  select org_id, run_id, 'a', 'a', 'sleep', 'waiting', 1, clock_timestamp() from n where n % 2 = 1;
insert into timer (org_id, run_id, step_key, kind, due_at)
  select org_id, run_id, 'a', 'sleep', clock_timestamp() from n where n % 2 = 1;
insert into share (org_id, queue, active) select org_id, 'q' || n, true from n;
insert into sampling (at) values (clock_timestamp() - interval '1 minute');
"""
LANES = """
insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
  select org_id, n * 4, 'q' || n, $1, '{}', 0, 0, n % 2 = 0 from n
"""
WORKER = """
insert into worker (worker_id, host, pid, queues, capabilities, expires_at, release, labels)
values ($1, 'here', 1, $2, $3, clock_timestamp() + interval '1 minute', '0', '{}')
"""


def _joined(values: list[Any]) -> str:
    return chr(30).join(map(str, values))


def _cases(rows: list[Any], ready: list[Any], worker_id: uuid.UUID, able: str) -> dict[str, Any]:
    """Return what each statement is asked with, for a batch of running items and one of ready items."""
    many: Callable[[Any], list[Any]] = lambda value: [value] * len(rows)  # noqa: E731
    orgs, ids = [row["org_id"] for row in rows], [row["run_id"] for row in rows]
    tokens, lanes = [row["token"] for row in rows], [4 * row["n"] for row in ready]
    owners, items = [row["org_id"] for row in ready], [row["run_id"] for row in ready]
    queues_now = [f"q{row['n']}" for row in ready]
    leases, steps, now = (orgs, ids, tokens), (orgs, ids, many("a")), datetime.now(UTC)
    text = tuple(map(_joined, leases))
    return {
        "commit.record": (
            *text, *map(_joined, (many("b"), many("b"), many("step"), many("done"), many("1"), many(""), many(1),
            many(0.1), many("step.done"), many("{}"), many(1), [True] * len(rows))),
        ),
        "commit.record_done": (
            *text, *map(_joined, map(many, ("c", "c", "1", 0.1, "{}", 1))),
        ),
        "commit.finish": (*text, *map(_joined, map(many, ("succeeded", "null", "", "{}")))),
        "waits.ready": (orgs, ids, many(None), many(None), many(0), 1, 1, 3, "!"),
        "waits.lock_items": (orgs, ids),
        "waits.take_timers": steps,
        "waits.end_sleeps": steps,
        "waits.history": (orgs, ids),
        "maintenance.unlease": (*leases, many(now)),
        "quarantine.fail_poisoned": (*leases, many("{}"), many(now)),
        "deadlines.end": (orgs, ids, "{}"),
        "endings.drop_waits": (orgs, ids),
        "remote.orders": (orgs, ids),
        "remote.hold": leases,
        "remote.settle": (
            orgs, ids, ids, many("a"), many("done"), many("1"), many(None), many(1), many("step.done"), many("{}"),
            many(1),
        ),
        "remote.drop": leases,
        "needs.riders": (*leases, many("a")),
        "charging.charge": (owners, queues_now, many(1.0)),
        "claim.heads": (100, worker_id, queues_now, many(10), [able], 16),
        "claim.at_once": (
            100, worker_id, uuid.uuid4(), queues_now, many(100), many(10), [able], many(1.0), 64, 0,
        ),
        "claim.take": (
            *map(_joined, (owners, lanes, [row["n"] for row in ready], items)), worker_id, uuid.uuid4(),
            *map(_joined, (owners, lanes, many(1), [False] * len(rows))),
            *map(_joined, (owners, queues_now, many(1.0), [True] * len(rows))), queues_now, many(1.0),
        ),
        "sampling.look": (),
    }  # fmt: skip


async def rows_read(con: asyncpg.Connection[Any], statement: Any, args: Any) -> dict[str, int]:
    """Execute a statement, take it back, and tell how many rows of which tables it read."""
    transaction = con.transaction()
    await transaction.start()
    try:
        before = {row["relname"]: row["rows"] for row in await con.fetch(READ)}
        await statement.fetch(*args)
        after = {row["relname"]: row["rows"] for row in await con.fetch(READ)}
    finally:
        await transaction.rollback()
    return {table: rows - before.get(table, 0) for table, rows in after.items()}


async def test_plans_made_over_empty_tables_read_by_key_when_they_are_full(pond: Pond) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow, worker_id = pond.flow(idle), uuid.uuid4()
    await vacuum(pond)
    con = await asyncpg.connect(pond.urls.engine)
    try:
        nothing = _cases([], [], worker_id, flow.capability)
        kept = {}
        for name, args in nothing.items():
            room, one = name.split(".")
            kept[name] = await con.prepare(queries(room)[one])
            await rows_read(con, kept[name], args)
        async with pond.db.org(pond.org_id) as app:
            await submit(app, [pond.intent(flow, n) for n in range(ROWS)])
        await con.execute(FILL)
        await con.execute(LANES, flow.capability)
        running = await con.fetch("select * from n where n % 2 = 1 order by n limit $1", BATCH)
        ready = await con.fetch("select * from n where n % 2 = 0 order by n limit $1", BATCH)
        slots = orjson.dumps({f"q{row['n']}": 100 for row in ready}).decode()
        await con.execute(WORKER, worker_id, slots, [flow.capability])
        found, touched = [], 0
        for name, args in _cases(running, ready, worker_id, flow.capability).items():
            read = await rows_read(con, kept[name], args)
            touched += any(read.get(table, 0) >= BATCH for table in TABLES)
            found += [f"{name}: {read[t]} of {t}" for t in sorted(TABLES) if read.get(t, 0) > MOST]
    finally:
        await con.close()
    assert found == []
    # Each found its batch, so that none read little because there was nothing for it.
    assert touched == len(nothing)
