"""What looks leases up by their worker reads each of them once, and each worker once (decision 0044)."""

from __future__ import annotations

import uuid

import asyncpg
from tests.engine.conftest import Pond
from tests.engine.test_kept_plans import rows_read

from millpond.db.queries import queries

LEASES, WORKERS = 3000, 20
FILL = """
with w as (
  insert into worker (worker_id, host, pid, queues, capabilities, expires_at, release, labels)
  select id, 'here', 1, '{}', '{}', clock_timestamp() + interval '1 hour', '0', '{}' from unnest($1::uuid[]) id
)
insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
select 1 + n % 50, i.id, i.id, 4, 'default', '{}', ($1::uuid[])[1 + n % $2::int], 1, i.id
from generate_series(1, $3::int) n cross join lateral (select gen_random_uuid() as id where n > 0) i
"""


async def test_workers_are_not_looked_up_for_each_lease(pond: Pond) -> None:
    workers = [uuid.uuid4() for _ in range(WORKERS)]
    con = await asyncpg.connect(pond.urls.engine)
    try:
        await con.execute(FILL, workers, WORKERS, LEASES)
        watch = await con.prepare(queries("maintenance")["watch"])
        orphaned = await con.prepare(queries("maintenance")["orphaned"])
        look = await con.prepare(queries("agenda")["look"])
        asked = {
            look: (True, False, None, None, False, False, True),
            orphaned: (500, 6.0),
            watch: (workers[0], None, None),
        }
        for statement, args in asked.items():
            read = await rows_read(con, statement, args)
            assert read["worker"] <= 4 * WORKERS, statement.get_query()
            assert LEASES <= read["lease"] <= 2 * LEASES, statement.get_query()
            assert read.get("item", 0) <= LEASES // WORKERS
        # Nobody is gone; then one is, with all that it held.
        assert "dead" not in (await look.fetch(*asked[look]))[0]["todo"]
        await con.execute("delete from worker where worker_id = $1", workers[0])
        assert "dead" in (await look.fetch(*asked[look]))[0]["todo"]
        assert len(await watch.fetch(workers[1], *asked[watch][1:])) == LEASES // WORKERS
    finally:
        await con.close()
