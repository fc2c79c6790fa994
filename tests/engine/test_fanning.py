"""Branches side by side: `ctx.map` under its bound, replayed whatever ended first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.engine.context import Context, StepFailed
from millpond.errors import InvalidInput, Permanent


async def test_map_gives_results_in_order_and_never_runs_more_than_its_limit(pond: Pond) -> None:
    under_way, most = 0, 0

    async def fan(ctx: Context, count: int) -> list[int]:
        async def square(number: int) -> int:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.002 * (number % 3))
            under_way -= 1
            return number * number

        return await ctx.map(lambda n: ctx.step("square", square, n), range(count), limit=4)

    pond.flow(fan)
    async with pond.worker():
        row = await pond.ended(await pond.submit("fan", 30))
    assert row["output"] == [n * n for n in range(30)]
    assert most == 4


async def test_map_of_nothing_and_without_room(pond: Pond) -> None:
    async def fan(ctx: Context, _: None) -> list[Any]:
        async def same(item: int) -> int:
            return item

        nothing: list[int] = await ctx.map(same, [])
        with pytest.raises(InvalidInput, match="limit"):
            await ctx.map(same, [1], limit=0)
        return nothing

    pond.flow(fan)
    async with pond.worker():
        assert (await pond.ended(await pond.submit("fan")))["output"] == []


async def test_branches_that_wait_give_their_place_to_the_next(pond: Pond) -> None:
    async def fan(ctx: Context, count: int) -> int:
        async def nap(number: int) -> int:
            await ctx.sleep(3600, name="nap")
            return number

        return sum(await ctx.map(nap, range(count), limit=3))

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan", 40)
        event = await pond.until(run_id, "run.waiting")
        assert len(event.data["steps"]) == 40
        assert await pond.count("timer") == 40
        async with pond.engine_db.duty("test") as con:
            await con.execute("update timer set due_at = clock_timestamp()")
        assert (await pond.ended(run_id))["output"] == sum(range(40))


async def test_a_place_is_also_given_on_by_a_branch_whose_own_branches_all_wait(pond: Pond) -> None:
    async def fan(ctx: Context, count: int) -> None:
        async def pair(number: int) -> None:
            await ctx.parallel(ctx.sleep(3600, name="a"), ctx.sleep(3600, name="b"))

        await ctx.map(pair, range(count), limit=2)

    pond.flow(fan)
    async with pond.worker():
        event = await pond.until(await pond.submit("fan", 6), "run.waiting")
    assert len(event.data["steps"]) == 12


async def test_with_bound_waiting_no_more_than_the_limit_are_begun_and_not_over(pond: Pond) -> None:
    async def fan(ctx: Context, count: int) -> None:
        async def nap(number: int) -> None:
            await ctx.sleep(3600, name="nap")

        await ctx.map(nap, range(count), limit=3, bound_waiting=True)

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan", 7)
        for nth, waiting in enumerate([3, 3, 1], 1):
            event = await pond.until(run_id, "run.waiting", nth=nth)
            assert len(event.data["steps"]) == waiting
            async with pond.engine_db.duty("test") as con:
                await con.execute("update timer set due_at = clock_timestamp()")
        assert (await pond.ended(run_id))["outcome"] == "succeeded"


async def test_records_belong_to_items_whatever_ended_first(pond: Pond) -> None:
    calls: list[int] = []
    delays = [0.05, 0.0, 0.03, 0.01, 0.02]

    async def fan(ctx: Context, _: None) -> list[str]:
        async def work(number: int) -> str:
            calls.append(number)
            await asyncio.sleep(delays[number])
            return f"item {number}"

        async def strand(number: int) -> str:
            text = await ctx.step("work", work, number)
            await ctx.sleep(1.1)
            return text

        return await ctx.map(strand, range(5), limit=2)

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan")
        row = await pond.ended(run_id)
    assert row["output"] == [f"item {n}" for n in range(5)]
    assert sorted(calls) == [0, 1, 2, 3, 4]
    async with pond.engine_db.duty("test") as con:
        keys = await con.fetch("select step_key from step where kind = 'step' order by 1")
    assert [row[0] for row in keys] == [f"~0.{n}/work:0" for n in range(5)]


async def test_all_items_end_before_the_first_failure_by_position_is_raised(pond: Pond) -> None:
    done: list[int] = []

    async def fan(ctx: Context, _: None) -> str:
        async def work(number: int) -> None:
            if number in (2, 4):
                await asyncio.sleep(0.02 if number == 2 else 0)
                raise Permanent(f"item {number} is wrong")
            done.append(number)

        try:
            await ctx.map(lambda n: ctx.step("work", work, n), range(6), limit=2)
        except StepFailed as failed:
            return failed.message
        return "not reached"

    pond.flow(fan)
    async with pond.worker():
        row = await pond.ended(await pond.submit("fan"))
    assert row["output"] == "item 2 is wrong"
    assert done == [0, 1, 3, 5]


async def test_a_flows_own_time_limit_around_a_map_ends_its_branches_only(pond: Pond) -> None:
    async def fan(ctx: Context, _: None) -> str:
        async def nap(number: int) -> None:
            await ctx.step("hold", asyncio.Event().wait)

        try:
            async with asyncio.timeout(0.1):
                await ctx.map(nap, range(9), limit=2)
        except TimeoutError:
            await ctx.sleep(0.01)
            return "went on"
        return "not reached"

    pond.flow(fan)
    async with pond.worker():
        assert (await pond.ended(await pond.submit("fan")))["output"] == "went on"


async def test_a_branch_whose_own_time_limit_ends_its_wait_goes_on(pond: Pond) -> None:
    may_end = asyncio.Event()
    impatient: list[int] = []

    async def fan(ctx: Context, _: None) -> list[int]:
        async def nap(number: int) -> int:
            try:
                async with asyncio.timeout(0.05):
                    await ctx.sleep(3600, name="nap")
            except TimeoutError:
                impatient.append(number)
                if len(impatient) == 4:
                    may_end.set()
            return number

        _, numbers = await ctx.parallel(
            ctx.step("hold", may_end.wait), ctx.map(nap, range(4), limit=1)
        )
        return list(numbers)

    pond.flow(fan)
    async with pond.worker():
        row = await pond.ended(await pond.submit("fan"))
    assert row["output"] == [0, 1, 2, 3]
    assert sorted(impatient) == [0, 1, 2, 3]


async def test_a_cancelled_map_lets_go_of_every_branch(pond: Pond) -> None:
    from millpond.engine.operations import cancel

    begun = asyncio.Semaphore(0)
    let_go: list[int] = []

    async def fan(ctx: Context, _: None) -> None:
        async def hold(number: int) -> None:
            begun.release()
            try:
                await asyncio.Event().wait()
            finally:
                let_go.append(number)

        await ctx.map(lambda n: ctx.step("hold", hold, n), range(9), limit=3)

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan")
        for _ in range(3):
            await asyncio.wait_for(begun.acquire(), 20)
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, run_id, "user:test")
        pond.hints.cancelled([run_id])
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    assert sorted(let_go) == [0, 1, 2]
