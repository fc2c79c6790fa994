"""What replays the same: time, randomness, deadline, state; and sleeps of months that hold nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.engine import values, views
from millpond.engine.context import Context
from millpond.errors import InvalidInput


async def test_now_is_the_time_of_the_database_and_not_of_the_worker(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(1999, 12, 31, tzinfo=UTC)

    async def look(ctx: Context, _: None) -> datetime:
        return await ctx.now()

    pond.flow(look)
    monkeypatch.setattr(values, "datetime", Wrong)
    async with pond.engine_db.duty("test") as con:
        before = await con.fetchval("select clock_timestamp()")
    async with pond.worker():
        told = datetime.fromisoformat((await pond.ended(await pond.submit("look")))["output"])
    async with pond.engine_db.duty("test") as con:
        assert before <= told <= await con.fetchval("select clock_timestamp()")


async def test_now_and_random_are_the_same_in_every_attempt(pond: Pond) -> None:
    seen: list[list[Any]] = []

    async def dice(ctx: Context, _: None) -> None:
        async def roll() -> list[float]:
            return [ctx.random().random(), ctx.random().random()]

        first = await ctx.now()
        told = [first, await ctx.now(), ctx.random().random(), *await ctx.parallel(roll(), roll())]
        seen.append(told)
        await ctx.sleep(1.1)

    pond.flow(dice)
    async with pond.worker():
        first_id, second_id = await pond.submit("dice"), await pond.submit("dice")
        await pond.ended(first_id)
        await pond.ended(second_id)
    assert len(seen) == 4
    different = {repr(told) for told in seen}
    assert len(different) == 2
    for now, later, number, here, there in seen:
        assert now <= later
        assert now.tzinfo is not None
        assert abs(datetime.now(UTC) - now) < timedelta(minutes=5)
        assert len({number, *here, *there}) == 5
    assert (await pond.kinds(first_id)).count("value.recorded") == 2


async def test_the_deadline_is_told_where_there_is_one(pond: Pond) -> None:
    async def asks(ctx: Context, _: None) -> str:
        return "none" if ctx.deadline is None else ctx.deadline.isoformat()

    pond.flow(asks)
    async with pond.worker():
        free = await pond.ended(await pond.submit("asks"))
        bound = await pond.ended(await pond.submit("asks", deadline_s=600.0))
    assert free["output"] == "none"
    assert datetime.fromisoformat(bound["output"]) == bound["deadline_at"]


async def test_state_is_readable_from_outside_as_it_was_set_last(pond: Pond) -> None:
    sets = 0

    async def works(ctx: Context, _: None) -> None:
        nonlocal sets
        sets += 1
        await ctx.set_state("stage", "reading")
        await ctx.set_state("pages", {"read": 3})
        await ctx.set_state("stage", "thinking")
        await ctx.sleep(3600)

    pond.flow(works)
    async with pond.worker():
        run_id = await pond.submit("works")
        await pond.until(run_id, "run.waiting")
        async with pond.db.org(pond.org_id) as con:
            values = await views.state_values(con, pond.org_id, run_id)
        assert values == {"stage": '"thinking"', "pages": '{"read":3}'}
        async with pond.engine_db.duty("test") as con:
            await con.execute("update timer set due_at = clock_timestamp()")
        await pond.ended(run_id)
    assert sets == 2
    told = [event.data for event in await pond.events(run_id) if event.kind == "state.set"]
    assert [data["value"] for data in told] == ["reading", {"read": 3}, "thinking"]


async def test_state_above_its_size_is_refused(pond: Pond) -> None:
    async def boasts(ctx: Context, _: None) -> str:
        with pytest.raises(InvalidInput) as refused:
            await ctx.set_state("tale", "x" * 70_000)
        return refused.value.code

    pond.flow(boasts)
    async with pond.worker():
        assert (await pond.ended(await pond.submit("boasts")))["output"] == "too_large"


async def test_a_sleep_of_months_holds_nothing_and_fires_when_its_time_has_come(pond: Pond) -> None:
    contexts: list[weakref.ref[Context]] = []

    async def naps(ctx: Context, _: None) -> str:
        contexts.append(weakref.ref(ctx))
        await ctx.sleep(90 * 86_400, name="spring")
        return "awake"

    pond.flow(naps)
    async with pond.worker() as worker:
        run_id = await pond.submit("naps")
        started = await pond.until(run_id, "sleep.started")
        await pond.until(run_id, "run.waiting")
        assert await pond.count("lease") == 0
        async with asyncio.timeout(10):
            while contexts[0]() is not None:
                await asyncio.sleep(0.01)
                gc.collect()
        assert not worker._attempts
        until = datetime.fromisoformat(started.data["until"])
        assert timedelta(days=89) < until - datetime.now(UTC) < timedelta(days=91)
        async with pond.engine_db.duty("test") as con:
            await con.execute("update timer set due_at = due_at - interval '91 days'")
        assert (await pond.ended(run_id))["output"] == "awake"


async def test_the_10001st_step_is_refused_with_the_way_out(pond: Pond) -> None:
    async def endless(ctx: Context, _: None) -> None:
        for _ in range(10_001):
            await ctx.emit("tick")

    pond.flow(endless)
    run_id = await pond.submit("endless")
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into step (org_id, run_id, step_key, name, kind, state, attempt, started_at)"
            " select $1, $2, 'emit tick:' || n, 'tick', 'emit', 'done', 1, clock_timestamp()"
            " from generate_series(0, 9997) n",
            pond.org_id,
            run_id,
        )
        await con.execute("update item set attempt = 1")
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "too_many_steps"
    assert "continue_as" in row["error"]["advice"]
    assert await pond.count("step") == 10_000
