"""Group commits that wait for a locked row: what others record goes past them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_faults import _lease, _step


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    con = await asyncpg.connect(url, server_settings={"search_path": "millpond"})
    try:
        yield con
    finally:
        await con.close()


async def test_rows_that_somebody_holds_locked_keep_nobody_elses_records(
    pond: Pond, admin_url: str
) -> None:
    """As many batches are stuck as are committed side by side otherwise, one after the other."""
    async with _lease(pond, 4) as (leases, committer), _connected(admin_url) as holder:
        held = holder.transaction()
        await held.start()
        await holder.fetch(
            "select item_id from item where item_id = any($1::uuid[]) for update",
            [one.item_id for one in leases[:2]],
        )
        stuck = []
        for lease in leases[:2]:
            stuck.append(committer.record(_step(lease, is_new=True)))
            await asyncio.sleep(0.3)  # a batch of its own
        async with asyncio.timeout(DEADLINE_S):
            for lease in leases[2:]:
                await committer.record(_step(lease, is_new=True))
        assert not any(one.done() for one in stuck)
        await held.rollback()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*stuck)
    assert await pond.count("step") == 4
