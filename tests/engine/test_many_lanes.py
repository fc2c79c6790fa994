"""Lanes of one org that a claim reads: all of them, and of very many those whose heads come first."""

from __future__ import annotations

import uuid

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import Connection

ABLE = "echo@1"


async def _lanes(con: Connection, org_id: int, count: int) -> list[int]:
    """Let an org have so many lanes with work; returns them in the order of their heads."""
    numbers = list(range(1, count + 1))
    # Half of them go first by their offset, so that rank alone is not the order.
    await con.execute(
        "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)"
        " select $1, 4 * n, 'default', $2, '{}', case when 2 * n <= $4 then -2000 else 0 end, 1000 - n, true"
        " from unnest($3::int[]) n",
        *(org_id, ABLE, numbers, count),
    )
    await con.execute(
        "insert into ready (org_id, lane_id, rank, item_id)"
        " select $1, 4 * n, 1000 - n, gen_random_uuid() from unnest($2::int[]) n",
        *(org_id, numbers),
    )
    await con.execute(
        "insert into share (org_id, queue, virtual_s, active) values ($1, 'default', 0, true)",
        org_id,
    )
    return [4 * n for n in sorted(numbers, key=lambda n: (2 * n > count, -n))]


async def _heads(con: Connection, orgs: int, able: str = ABLE) -> dict[int, set[int]]:
    """Return the lanes that are read of each org."""
    found: dict[int, set[int]] = {}
    for row in await con.fetch(
        "select * from claim_heads(10, $1, '{default}', $2, $3, 2)",
        *(uuid.uuid4(), [orgs], [able]),
    ):
        if row["queue"]:
            found.setdefault(row["org_id"], set()).add(row["lane_id"])
            assert len(row["items"]) == 1
    return found


@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 90])
async def test_of_many_lanes_those_are_read_that_come_first(pond: Pond, count: int) -> None:
    async with pond.engine_db.duty("test") as con:
        order = await _lanes(con, pond.org_id, count)
        assert await _heads(con, 5) == {pond.org_id: set(order[:64])}
        assert await _heads(con, 5, "other@1") == {}


async def test_so_many_orgs_are_read_however_many_lanes_each_has(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        lanes = {org_id: await _lanes(con, org_id, 1 + org_id % 5) for org_id in range(11, 31)}
        # One has nothing that the worker can do: it takes nobody's place.
        await con.execute("update lane set capability = 'other@1' where org_id = 12")
        read = await _heads(con, 7)
    assert read == {org_id: set(lanes[org_id]) for org_id in (11, 13, 14, 15, 16, 17, 18)}
