"""What a claim reads of limits, tokens and interactive work: by key, also by plans made over next to nothing."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import Pond
from tests.engine.test_kept_plans import rows_read

from millpond.db.queries import queries

ROWS, BATCH = 3000, 20
# Each row of a batch is looked up in a table a few times at most.
MOST = 10 * BATCH
TABLES = "lane share ready lease step_lease room meter limit_change reservation lease_use"
URGENT = "select * from claim_urgent('{default}', '{256}', '{f@1}', 16)"
START = """
insert into told_rooms (queue, version) values ('default', 0);
insert into worker (worker_id, host, pid, queues, capabilities, expires_at, release, labels)
values (gen_random_uuid(), 'here', 1, '{"default": 5}', '{f@1}', clock_timestamp() + interval '1 hour', '0', '{}');
"""
# Of each org a lane, a share, a ready item, and rooms of a limit and of one on tokens, with their
# meters; of the first few the lane is of interactive work, and has been passed over for a minute.
FILL = """
with n as materialized (select n from generate_series($1::bigint, $2) n),
  l as (insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active, blocked_at)
    select n, 4, 'default', 'f@1', '{}', (n <= $3)::int, 0, true,
           case when n <= $3 then clock_timestamp() - interval '1 minute' end from n),
  s as (insert into share (org_id, queue, active) select n, 'default', true from n),
  r as (insert into ready (org_id, lane_id, rank, item_id) select n, 4, n, gen_random_uuid() from n),
  m as (insert into meter (room, tat_us) select 'rate k ' || n, n from n)
insert into room (room, queue, capability, due_us, version, maximum)
select 'rate k ' || n, 'default', 'f@1', n, 0, 1 from n
union all select 'tokens:5 k ' || n, 'default', 'f@1', n, n, 1 from n
"""
# A change of a limit of each org; by the owner, as are versions of limits.
CHANGES = """
insert into millpond.limit_change (version, owner, key, kind)
select n, n, 'k', 'concurrency' from generate_series($1::bigint, $2) n
"""
LEASES = """
insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
select n, i.id, i.id, 4, 'default', '{}', i.id, 1, i.id
from generate_series($1::bigint, $2) n cross join lateral (select gen_random_uuid() as id where n > 0) i
"""
# Of each org a lease with two reservations, one of them a step's try; of the first few it is told what both used.
TOKENS = """
with l as materialized (select org_id, item_id, token from lease where org_id between $1 and $2),
  s as (insert into step_lease (org_id, item_id, step_key, token, keys)
    select org_id, item_id, 'a', token, '{}' from l),
  u as (insert into lease_use (org_id, item_id, token, keys, tokens, step_key)
    select org_id, item_id, token, '{}', 9, k from l, unnest(array[null, 'a']) k where org_id <= $3)
insert into reservation (org_id, item_id, token, step_key, room, capability, tokens, parts, carried)
select org_id, item_id, token, k, 'tokens k ' || org_id, 'f@1', 10, '{}', '{}' from l, unnest(array['', 'a']) k
"""


async def session_over(pond: Pond, rows: int, *statements: str) -> asyncpg.Connection[Any]:
    """Open a session of the engine where the planner knows of so many rows of everything, as they now are."""
    con = await asyncpg.connect(pond.urls.engine)
    await con.execute(START)
    for statement in statements:
        await con.execute(statement, *(1, rows, BATCH)[: 3 if "$3" in statement else 2])
    owner = await asyncpg.connect(pond.urls.owner)
    try:
        await owner.execute("insert into millpond.limit_version (version) values (1)")
        await owner.execute(CHANGES, 1, rows)
        for table in TABLES.split():
            await owner.execute(f"vacuum (analyze) millpond.{table}")
    finally:
        await owner.close()
    return con


async def fill(con: asyncpg.Connection[Any], rows: int, *statements: str) -> None:
    for statement in statements:
        await con.execute(statement, rows + 1, *(ROWS, BATCH)[: 2 if "$3" in statement else 1])


@pytest.mark.parametrize("rows", [0, 1])
async def test_what_a_claim_reads_of_rooms_and_of_interactive_work(pond: Pond, rows: int) -> None:
    con = await session_over(pond, rows, FILL, LEASES)
    try:
        look = await con.prepare(queries("limiting")["rooms"])
        urgent = await con.prepare(URGENT)
        asked = [["default"], ["f@1"], 0, 10_000, BATCH, [-1], [""], [""], 5.0]
        await rows_read(con, look, asked)
        await rows_read(con, urgent, ())
        await fill(con, rows, FILL)
        await con.execute(LEASES, rows + 1, BATCH)
        # Limits of few orgs changed since the times of rooms were told.
        owner = await asyncpg.connect(pond.urls.owner)
        await owner.execute(CHANGES, rows + 1, ROWS)
        await owner.execute("update millpond.limit_version set version = $1", ROWS)
        await owner.close()
        await con.execute("update told_rooms set version = $1", ROWS - BATCH)
        read = await rows_read(con, look, asked)
        found = [f"rooms: {read[t]} of {t}" for t in TABLES.split() if read.get(t, 0) > MOST]
        kinds = [row["kind"] for row in await look.fetch(*asked)]
        counts = [kinds.count(one) for one in ("held", "room", "waiting")]
        assert counts == [BATCH, 2 * BATCH, BATCH]
        read = await rows_read(con, urgent, ())
        found += [f"urgent: {read[t]} of {t}" for t in TABLES.split() if read.get(t, 0) > MOST]
        assert len(await urgent.fetch()) == BATCH + 1
    finally:
        await con.close()
    assert found == []


@pytest.mark.parametrize("rows", [0, 1])
async def test_settling_what_was_reserved_reads_each_reservation_and_no_product(
    pond: Pond, rows: int
) -> None:
    con = await session_over(pond, rows, FILL, LEASES, TOKENS)
    try:
        settle = await con.prepare(queries("reservations")["settle"])
        await rows_read(con, settle, ())
        await fill(con, rows, FILL, LEASES, TOKENS)
        # Some leases are over, and what they had comes back where lanes stand.
        await con.execute("delete from lease where org_id between $1 and $2", BATCH - 4, BATCH + 5)
        read = await rows_read(con, settle, ())
        settled = await settle.fetch()
    finally:
        await con.close()
    # Two reservations of each lease, read whole twice; each looked up by its keys once.
    whole = {"reservation": 4, "lease": 2, "step_lease": 1, "room": 1}
    found = [
        f"{t}: {read[t]}" for t in TABLES.split() if read.get(t, 0) > MOST + whole.get(t, 0) * ROWS
    ]
    assert found == []
    # Those of what was used, and of the leases that are over.
    assert len([row for row in settled if row["capability"]]) == 2 * (BATCH + 5)
    assert len([row for row in settled if not row["capability"]]) == ROWS - 10
