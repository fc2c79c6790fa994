"""Live keys as schedules and flows take them: in the engine's own transactions."""

from __future__ import annotations

import uuid

import pytest
from tests.engine.conftest import Pond

from millpond.engine import dedup
from millpond.engine.dedup import OnDuplicate, Settled
from millpond.engine.submit import submit
from millpond.errors import Conflict


async def start(pond: Pond, on_duplicate: OnDuplicate) -> tuple[uuid.UUID, Settled]:
    """Submit a run with a key as the engine's role."""
    intent = pond.intent("nowhere", dedup_key="nightly")
    async with pond.engine_db.duty("schedule") as con:
        settled = await dedup.settle(con, intent, on_duplicate)
        if settled.joined is None:
            await submit(con, [intent])
    return intent.run_id, settled


async def test_the_engine_joins_replaces_and_is_refused_as_the_api_is(pond: Pond) -> None:
    first, settled = await start(pond, "reject")
    assert settled == Settled()
    _, joined = await start(pond, "join")
    assert joined.joined is not None
    assert joined.joined.run_id == first
    with pytest.raises(Conflict) as refused:
        await start(pond, "reject")
    assert refused.value.details == {"run_id": str(first)}
    second, replaced = await start(pond, "cancel_old")
    assert replaced.replaced == first
    assert (await pond.run_row(first))["outcome"] == "cancelled"
    assert await pond.count("live_key", f"run_id = '{second}'") == 1
    assert await pond.count("live_key") == 1


async def test_a_submit_that_is_rolled_back_leaves_the_key_where_it_was(pond: Pond) -> None:
    first, _ = await start(pond, "reject")
    intent = pond.intent("nowhere", dedup_key="nightly")
    with pytest.raises(RuntimeError):
        async with pond.engine_db.duty("schedule") as con:
            await dedup.settle(con, intent, "cancel_old")
            raise RuntimeError
    assert await pond.count("live_key", f"run_id = '{first}'") == 1
    assert (await pond.run_row(first))["outcome"] is None
