"""What telling of lines reads is bounded however many orgs there are: by rows that the database read, not by time."""

from __future__ import annotations

import uuid

import asyncpg
import pytest
from tests.engine.conftest import Pond
from tests.engine.test_fair_position import hand_of, send

from millpond.engine.saturation_of_all import orgs_of_all
from millpond.engine.why import MAX_AHEAD, explain

READ = """
select coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::bigint from pg_stat_xact_user_tables
where schemaname = 'millpond'
"""


async def fill(
    admin_url: str,
    first: int,
    count: int,
    *,
    able: str = "echo@1",
    is_active: bool = True,
    lanes: int = 1,
) -> None:
    """Make orgs that go first of all, each with lanes of one ready work item; without `is_active` these are over."""
    admin = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    ids = list(range(first, first + count))
    await admin.execute(
        "insert into org (org_id, slug, name) select n, 'org-' || n, '' from unnest($1::bigint[]) n",
        ids,
    )
    await admin.execute(
        "insert into share (org_id, queue, virtual_s, weight, active)"
        " select n, 'default', case when $2 then -1e6 else 0 end, 1, $2 from unnest($1::bigint[]) n",
        *(ids, is_active),
    )
    await admin.execute(
        "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)"
        " select n, 4 * k, 'default', $2, '{}', 0, 1, $3"
        " from unnest($1::bigint[]) n, generate_series(1, $4) k",
        *(ids, able, is_active, lanes),
    )
    if is_active:
        await admin.execute(
            "insert into ready (org_id, lane_id, rank, item_id)"
            " select n, 4 * k, 1, gen_random_uuid()"
            " from unnest($1::bigint[]) n, generate_series(1, $2) k",
            *(ids, lanes),
        )
    await admin.execute("analyze share, lane, ready, org")
    await admin.close()


async def read_for_place(pond: Pond, run_id: uuid.UUID) -> tuple[int, bool]:
    """Ask for a place in line; returns how many rows that read, and whether the place is exact."""
    async with pond.db.org(pond.org_id) as con:
        before = await con.fetchval(READ)
        found = await explain(con, pond.org_id, run_id)
        read = await con.fetchval(READ) - before
    (reason,) = [one for one in found.reasons if one.kind == "in_line"]
    return read, reason.facts["is_order_exact"]


@pytest.mark.parametrize("able", ["echo@1", "other@1"])
async def test_a_place_is_told_by_as_many_rows_whatever_stands_before(
    pond: Pond, admin_url: str, able: str
) -> None:
    """Also where what stands there is nothing that any worker can do, so that it is not counted."""
    await hand_of(pond)
    (run_id,) = await send(pond, pond.org_id, 1)
    assert (await read_for_place(pond, run_id))[1]
    await fill(admin_url, 1_000_000, 9000, able=able)
    read, is_exact = await read_for_place(pond, run_id)
    assert not is_exact
    assert 2 * MAX_AHEAD < read < 5 * MAX_AHEAD


async def test_of_an_org_with_many_lanes_as_many_are_read_as_are_told_of(
    pond: Pond, admin_url: str
) -> None:
    await hand_of(pond)
    (run_id,) = await send(pond, pond.org_id, 1)
    await fill(admin_url, 1_000_000, 1, lanes=20_000)
    read, is_exact = await read_for_place(pond, run_id)
    assert not is_exact
    assert MAX_AHEAD < read < 6 * MAX_AHEAD


async def test_a_page_of_orgs_reads_nothing_of_those_without_work(
    pond: Pond, admin_url: str
) -> None:
    async def page() -> tuple[int, list[int]]:
        async with pond.db.globals() as con:
            before = await con.fetchval(READ)
            found, has_more = await orgs_of_all(con, "", 100)
            assert not has_more
            return await con.fetchval(READ) - before, [one.waiting for one in found]

    await fill(admin_url, 1_000_000, 5)
    few, waiting = await page()
    assert waiting == [1] * 5
    await fill(admin_url, 2_000_000, 5000, is_active=False)
    many, waiting = await page()
    assert waiting == [1] * 5
    assert many <= few + 50


async def test_of_an_org_with_much_work_a_page_counts_a_thousand(
    pond: Pond, admin_url: str
) -> None:
    await fill(admin_url, 1_000_000, 1, lanes=3000)
    async with pond.db.globals() as con:
        ((one,), _) = await orgs_of_all(con, "", 100)
    assert (one.waiting, one.is_waiting_exact) == (1000, False)
