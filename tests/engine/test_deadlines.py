"""Deadlines: a run that is not over in time fails, wherever it stands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond

from millpond.engine.context import Context
from millpond.engine.deadlines import expire
from millpond.engine.operations import cancel
from millpond.errors import InvalidInput, Transient
from millpond.retry import Retry


class Answer(BaseModel):
    yes: bool


async def overdue(pond: Pond) -> None:
    """Let every deadline be in the past, without waiting for it."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("update timer set due_at = clock_timestamp() where kind = 'deadline'")


async def assert_nothing_is_left(pond: Pond) -> None:
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0, table
    assert await pond.count("input_request", "state = 'pending'") == 0


async def test_a_running_run_is_unwound_and_fails(pond: Pond) -> None:
    was_unwound = asyncio.Event()

    async def hold(ctx: Context, _: None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_unwound.set()

    pond.flow(hold)
    async with pond.worker():
        run_id = await pond.submit("hold", deadline_s=600)
        await pond.until(run_id, "run.started")
        await overdue(pond)
        row = await pond.ended(run_id)
    assert was_unwound.is_set()
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "deadline_exceeded"
    assert (await pond.kinds(run_id))[-2:] == ["run.overdue", "run.failed"]
    await assert_nothing_is_left(pond)


async def test_a_run_inside_a_step_stops_too(pond: Pond) -> None:
    began = asyncio.Event()

    async def work(ctx: Context, _: None) -> None:
        async def endless() -> None:
            began.set()
            await asyncio.Event().wait()

        await ctx.step("endless", endless)

    pond.flow(work)
    async with pond.worker():
        run_id = await pond.submit("work", deadline_s=600)
        await began.wait()
        await overdue(pond)
        row = await pond.ended(run_id)
    assert (row["outcome"], row["error"]["code"]) == ("failed", "deadline_exceeded")


@pytest.mark.parametrize("options", [{}, {"delay_s": 300.0}])
async def test_a_run_that_nobody_took_up_fails(pond: Pond, options: dict[str, Any]) -> None:
    run_id = await pond.submit("nowhere", deadline_s=600, **options)
    await overdue(pond)
    expired = await expire(pond.engine_db)
    assert list(expired.ended) == [run_id]
    row = await pond.run_row(run_id)
    assert (row["outcome"], row["error"]["code"]) == ("failed", "deadline_exceeded")
    assert (await pond.kinds(run_id))[1:] == ["run.failed"]
    await assert_nothing_is_left(pond)


async def test_a_run_that_sleeps_backs_off_or_asks_fails(pond: Pond) -> None:
    async def nap(ctx: Context, _: None) -> None:
        await ctx.sleep(3600)

    async def ask(ctx: Context, _: None) -> None:
        await ctx.ask_human("ok", role="support", form=Answer)

    async def stumble(ctx: Context, _: None) -> None:
        raise Transient("not now", retry_after_s=600)

    rested = {"nap": "run.waiting", "ask": "run.awaiting_input", "stumble": "run.retrying"}
    for function in (nap, ask, stumble):
        pond.flow(function, retry=Retry(max_elapsed_s=6000))
    async with pond.worker():
        ids = {name: await pond.submit(name, deadline_s=600) for name in rested}
        for name, kind in rested.items():
            await pond.until(ids[name], kind)
        await overdue(pond)
        for run_id in ids.values():
            row = await pond.ended(run_id)
            assert (row["outcome"], row["error"]["code"]) == ("failed", "deadline_exceeded")
    await assert_nothing_is_left(pond)


async def test_a_run_that_is_over_in_time_leaves_no_deadline(pond: Pond) -> None:
    async def quick(ctx: Context, _: None) -> str:
        return "done"

    pond.flow(quick)
    async with pond.worker():
        run_id = await pond.submit("quick", deadline_s=600)
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    await assert_nothing_is_left(pond)


async def test_a_person_who_cancelled_first_decides_how_the_run_ends(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def stubborn(ctx: Context, _: None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    pond.flow(stubborn)
    async with pond.worker():
        run_id = await pond.submit("stubborn", deadline_s=600)
        await pond.until(run_id, "run.started")
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:ann")
        await overdue(pond)
        while await pond.count("timer"):
            await expire(pond.engine_db)
        may_end.set()
        row = await pond.ended(run_id)
    assert row["outcome"] == "cancelled"
    assert "run.overdue" not in await pond.kinds(run_id)


async def test_a_run_locked_by_somebody_is_left_for_the_next_look(pond: Pond) -> None:
    run_id = await pond.submit("nowhere", deadline_s=600)
    await overdue(pond)
    async with pond.db.org(pond.org_id) as con:
        await con.execute("select from item where item_id = $1 for update", run_id)
        assert not (await expire(pond.engine_db)).ended
    assert list((await expire(pond.engine_db)).ended) == [run_id]


async def test_a_deadline_before_the_start_is_refused(pond: Pond) -> None:
    with pytest.raises(InvalidInput, match="deadline"):
        await pond.submit("nowhere", deadline_s=60, delay_s=60)


async def test_a_flows_own_deadline_holds_for_its_runs_as_children(pond: Pond) -> None:
    async def leaf(ctx: Context, _: None) -> None:
        return None

    leaf_flow = pond.flow(leaf, deadline_s=600.0)

    async def outer(ctx: Context, _: None) -> None:
        children = [
            await ctx.start("leaf", name="named"),
            await ctx.start("leaf", name="placed", version=1, queue="default"),
            await ctx.start(leaf_flow, name="given"),
            await ctx.start(leaf_flow, name="later", delay_s=0.1),
            await ctx.start("leaf", name="own", deadline_s=60.0),
        ]
        for child in children:
            await ctx.join(child)

    pond.flow(outer)
    async with pond.worker():
        await pond.ended(await pond.submit("outer"))
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch(
            "select parent_key, extract(epoch from deadline_at - created_at)::float8 as left_s "
            "from run where flow = 'leaf'"
        )
    left_s = {row["parent_key"]: round(row["left_s"] or 0.0, 2) for row in rows}
    assert left_s == {
        "named:0": 600.0,
        "placed:0": 600.0,
        "given:0": 600.0,
        "later:0": 600.1,
        "own:0": 60.0,
    }
