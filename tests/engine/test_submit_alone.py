"""A submit that is a transaction by itself: one message, in its org, refused when rights are gone."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.engine.quotas import Ticket
from millpond.engine.submit import submit_alone
from millpond.errors import BlockGone, InvalidInput, Unauthenticated
from millpond.types import Standing


async def test_runs_are_stored_executed_and_leave_the_connection_without_an_org(
    pond: Pond,
) -> None:
    async def double(ctx: Any, n: int) -> int:
        return 2 * n

    flow = pond.flow(double)
    run_ids = await submit_alone(pond.db, [pond.intent(flow, n) for n in range(3)])
    async with pond.db.alone() as con:
        assert await con.fetchval("select count(*) from run") == 0
    async with pond.worker():
        assert [(await pond.ended(run_id))["output"] for run_id in run_ids] == [0, 2, 4]


async def test_a_big_input_is_stored_with_its_run(pond: Pond) -> None:
    async def measure(ctx: Any, text: str) -> int:
        return len(text)

    flow = pond.flow(measure)
    (run_id,) = await submit_alone(pond.db, [pond.intent(flow, "x" * 400_000)])
    async with pond.worker():
        assert (await pond.ended(run_id))["output"] == 400_000


async def test_callers_whose_rights_are_gone_store_nothing(pond: Pond) -> None:
    callers = [(f"user:{uuid.uuid4()}", Standing(stamp=1))]
    with pytest.raises(Unauthenticated):
        await submit_alone(pond.db, [pond.intent("any", 1)], callers=callers)
    assert await pond.count("run") == 0


async def test_a_block_that_is_gone_pays_for_nothing(pond: Pond) -> None:
    with pytest.raises(BlockGone):
        await submit_alone(pond.db, [pond.intent("any", 1)], Ticket(1, [uuid.uuid4()]))
    assert await pond.count("run") == 0


async def test_all_intents_are_of_one_org(pond: Pond) -> None:
    with pytest.raises(InvalidInput, match="same org"):
        await submit_alone(
            pond.db, [pond.intent("any", 1), pond.intent("any", 2, org_id=pond.org_id + 1)]
        )
