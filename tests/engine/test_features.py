"""Features that plans switch off, where the engine itself starts runs: by the clock and by events."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import orjson
import pytest_asyncio

from millpond.engine import features, firing

from . import test_schedules, test_triggers
from .conftest import Pond
from .test_schedules import back, publish, reporting
from .test_triggers import amounts, let_lapse, send, shop

__all__ = ["reporting", "shop"]


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    yield con
    await con.close()


async def switch(admin: asyncpg.Connection, org: int, **switches: bool) -> None:
    """Give an org features of its own, instead of its plan's."""
    await admin.execute(
        "update org set features = $2 where org_id = $1", org, orjson.dumps(switches).decode()
    )


async def test_a_due_schedule_starts_nothing_while_schedules_are_off_and_says_so(
    reporting: Pond, other_org: int, admin: asyncpg.Connection
) -> None:
    pond = reporting
    await publish(pond)
    schedule = await test_schedules.make(pond, name="one", missed="one")
    await switch(admin, pond.org_id, schedules=False)
    await back(pond, schedule, seconds=30)
    assert await firing.fire(pond.engine_db) == []
    after = await test_schedules.read(pond, schedule)
    assert after.last_error == features.off("schedules")
    assert after.next_due_at is not None
    await switch(admin, pond.org_id, schedules=True)
    await back(pond, schedule, seconds=30)
    assert len(await firing.fire(pond.engine_db)) == 1
    assert (await test_schedules.read(pond, schedule)).last_error is None


async def test_events_start_nothing_while_triggers_are_off_and_are_counted_as_dropped(
    shop: Pond, admin: asyncpg.Connection
) -> None:
    """By the plan this time: at once as well as what a group has gathered."""
    at_once = await test_triggers.make(shop)
    gathering = await test_triggers.make(
        shop, name="tally", flow="tally", mode="batch", max_count=10, max_wait_s=3600.0
    )
    await admin.execute("""update plan set features = '{"triggers": false}'""")
    await send(shop, {"amount": 1}, {"amount": 2})
    await let_lapse(shop)
    assert await amounts(shop) == []
    for trigger in (at_once, gathering):
        after = await test_triggers.read(shop, trigger)
        assert (after.last_error, after.dropped) == (features.off("triggers"), 2)
    await admin.execute("update plan set features = '{}'")
    await send(shop, {"amount": 3})
    assert await amounts(shop) == [3]
    assert (await test_triggers.read(shop, at_once)).last_error is None


async def test_which_orgs_have_a_feature_is_asked_for_many_at_once(
    pond: Pond, other_org: int, admin: asyncpg.Connection
) -> None:
    await admin.execute("""update plan set features = '{"secrets": false, "schedules": true}'""")
    await switch(admin, other_org, secrets=True, triggers=False)
    both = [pond.org_id, other_org]
    async with pond.engine_db.duty("test") as con:
        assert await features.without(con, both, "secrets") == {pond.org_id}
        assert await features.without(con, both, "triggers") == {other_org}
        assert await features.without(con, both, "schedules") == set()
        assert await features.without(con, [], "secrets") == set()
