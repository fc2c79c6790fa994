"""What is pruned gives its space to what comes after: over many cycles the tables stay as big as one cycle needs."""

from __future__ import annotations

import asyncpg
from tests.engine.conftest import Pond
from tests.engine.test_retention import BELONGINGS, DAY_S, fill, swept

CYCLES = 6
RUNS = 4_000
# Over the third cycle: emptied pages of an index are used again one vacuum later, or two where another session's
# snapshot is older. Without reuse the last would be twice the third.
ALLOWED = 1.1


async def test_tables_stay_bounded_over_repeated_cycles(pond: Pond, admin_url: str) -> None:
    """Each cycle's runs are younger than those before, as time goes on, so that indexes grow at one end only."""
    names = ", ".join(f"'millpond.{name}'" for name in BELONGINGS)
    tables = (
        f"select sum(pg_total_relation_size(t::regclass))::bigint from unnest(array[{names}]) t"
    )
    admin = await asyncpg.connect(admin_url)
    sizes = []
    for cycle in range(CYCLES):
        await fill(admin_url, pond.org_id, RUNS, age_s=(400 - 10 * cycle) * DAY_S)
        sizes.append(await admin.fetchval(tables))
        await admin.execute("update millpond.retention set pass_began_at = '2020-01-01Z'")
        await swept(pond)
        # As autovacuum does when a fifth of a table is dead.
        await admin.execute(f"vacuum {', '.join(f'millpond.{name}' for name in BELONGINGS)}")
    assert await pond.count("run") == 0
    await admin.close()
    assert max(sizes[3:]) <= ALLOWED * sizes[2]
