"""Signals: sent before or while a run waits, each taken once, over timeouts and at the same moment."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond

from millpond.engine import signals
from millpond.engine.context import Context, SignalTimedOut
from millpond.errors import Conflict, InvalidInput, NotFound, Permanent
from millpond.types import new_id


async def tell(pond: Pond, run_id: uuid.UUID, name: str, data: Any = None) -> signals.Sent:
    """Send a signal as the API does."""
    async with pond.db.org(pond.org_id) as con:
        sent = await signals.send(
            con,
            pond.org_id,
            run_id,
            signal_id=new_id(),
            name=name,
            data=data,
            subject="user:ann",
        )
    pond.hints.wake([sent.readied.queue] if sent.readied.queue else [])
    pond.hints.changed([run_id])
    return sent


class Payment(BaseModel):
    cents: int


async def test_a_run_waits_without_a_slot_and_goes_on_when_it_is_told(pond: Pond) -> None:
    async def order(ctx: Context, _: None) -> dict[str, Any]:
        paid = await ctx.wait_event("paid", output=Payment)
        return {"cents": paid.data.cents, "by": paid.sent_by}

    pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit("order")
        await pond.until(run_id, "run.waiting")
        assert await pond.count("lease") == 0
        sent = await tell(pond, run_id, "paid", {"cents": 700})
        assert sent.readied.queue == "default"
        row = await pond.ended(run_id)
    assert row["output"] == {"cents": 700, "by": "user:ann"}
    kinds = [kind for kind in await pond.kinds(run_id) if kind.startswith("signal.")]
    assert kinds == ["signal.awaited", "signal.received", "signal.taken"]


async def test_a_signal_sent_before_the_wait_is_not_lost_and_the_oldest_goes_first(
    pond: Pond,
) -> None:
    async def reads(ctx: Context, _: None) -> list[Any]:
        return [(await ctx.wait_event("letter")).data for _ in range(3)]

    pond.flow(reads)
    run_id = await pond.submit("reads")
    for text in ("first", "second", "third"):
        assert (await tell(pond, run_id, "letter", text)).readied.queue == ""
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == ["first", "second", "third"]
    assert row["attempts"] == 1
    assert "run.waiting" not in await pond.kinds(run_id)


async def test_a_signal_to_a_running_run_is_found_when_it_parks(pond: Pond) -> None:
    is_working, may_go = asyncio.Event(), asyncio.Event()

    async def both(ctx: Context, _: None) -> Any:
        async def work() -> None:
            is_working.set()
            await may_go.wait()

        told, _ = await ctx.parallel(ctx.wait_event("go"), ctx.step("work", work))
        return told.data

    pond.flow(both)
    async with pond.worker():
        run_id = await pond.submit("both")
        await pond.until(run_id, "signal.awaited")
        await asyncio.wait_for(is_working.wait(), 20)
        assert (await tell(pond, run_id, "go", 5)).readied.queue == ""
        may_go.set()
        assert (await pond.ended(run_id))["output"] == 5


async def test_the_first_of_several_names_ends_a_wait_and_all_waits_for_each(pond: Pond) -> None:
    async def waits(ctx: Context, _: None) -> list[Any]:
        first = await ctx.wait_event("yes", "no")
        every = await ctx.wait_event("a", "b", all=True)
        return [first.name, *(one.name for one in every), *(one.data for one in every)]

    pond.flow(waits)
    async with pond.worker():
        run_id = await pond.submit("waits")
        await pond.until(run_id, "run.waiting")
        await tell(pond, run_id, "no")
        await pond.until(run_id, "run.waiting", nth=2)
        assert (await tell(pond, run_id, "b", 2)).readied.queue == ""
        assert (await tell(pond, run_id, "a", 1)).readied.queue == "default"
        row = await pond.ended(run_id)
    assert row["output"] == ["no", "a", "b", 1, 2]


async def test_two_waits_for_one_name_get_one_signal_each(pond: Pond) -> None:
    async def pair(ctx: Context, _: None) -> list[Any]:
        async def one() -> Any:
            return (await ctx.wait_event("part")).data

        return list(await ctx.parallel(one(), one()))

    pond.flow(pair)
    async with pond.worker():
        run_id = await pond.submit("pair")
        await pond.until(run_id, "run.waiting")
        await asyncio.gather(tell(pond, run_id, "part", 1), tell(pond, run_id, "part", 2))
        row = await pond.ended(run_id)
    assert sorted(row["output"]) == [1, 2]
    assert await pond.count("signal", "step_key is not null") == 2


async def test_a_signal_ends_the_wait_that_it_completes(pond: Pond) -> None:
    """A wait for all that still lacks one leaves the signal to a wait that needs no more."""

    async def pair(ctx: Context, _: None) -> list[Any]:
        async def all_of() -> list[str]:
            every = await ctx.wait_event("x", "y", all=True)
            return [one.data for one in every]

        async def one() -> Any:
            return (await ctx.wait_event("x")).data

        return list(await ctx.parallel(all_of(), one()))

    pond.flow(pair)
    async with pond.worker():
        run_id = await pond.submit("pair")
        await pond.until(run_id, "run.waiting")
        for name, data in (("x", "first"), ("y", "why"), ("x", "second")):
            await tell(pond, run_id, name, data)
        row = await pond.ended(run_id)
    assert row["output"] == [["second", "why"], "first"]


async def test_a_wait_ends_by_time_with_its_default_or_an_error(pond: Pond) -> None:
    async def hopes(ctx: Context, _: None) -> list[Any]:
        got = [await ctx.wait_event("word", timeout_s=0.05, default=None)]
        try:
            await ctx.wait_event("word", "deed", all=True, timeout_s=0.05)
        except SignalTimedOut as late:
            got.append(late.code)
        got.append((await ctx.wait_event("word")).data)
        return got

    pond.flow(hopes)
    async with pond.worker():
        run_id = await pond.submit("hopes")
        await pond.until(run_id, "signal.timed_out", nth=2)
        await tell(pond, run_id, "word", "kept")
        row = await pond.ended(run_id)
    assert row["output"] == [None, "signal_timed_out", "kept"]
    assert await pond.count("timer") == 0


async def test_a_signal_that_came_in_time_leaves_no_timer(pond: Pond) -> None:
    async def waits(ctx: Context, _: None) -> Any:
        told = await ctx.wait_event("go", timeout_s=3600)
        await ctx.sleep(3600)
        return told.data

    pond.flow(waits)
    async with pond.worker():
        run_id = await pond.submit("waits")
        await pond.until(run_id, "run.waiting")
        assert await pond.count("timer", "kind = 'signal'") == 1
        await tell(pond, run_id, "go")
        await pond.until(run_id, "sleep.started")
        assert await pond.count("timer", "kind = 'signal'") == 0


async def test_data_of_another_shape_fails_the_flow_for_good(pond: Pond) -> None:
    async def strict(ctx: Context, _: None) -> Any:
        try:
            await ctx.wait_event("paid", output=Payment)
        except Permanent as error:
            return [error.code, "secret" in error.message]
        return "not reached"

    pond.flow(strict)
    run_id = await pond.submit("strict")
    await tell(pond, run_id, "paid", {"cents": "secret"})
    async with pond.worker():
        assert (await pond.ended(run_id))["output"] == ["signal_mismatch", False]


async def test_who_cannot_be_told_is_said_clearly(pond: Pond, other_org: int) -> None:
    async def quick(ctx: Context, _: None) -> None:
        return None

    pond.flow(quick)
    run_id = await pond.submit("quick")
    with pytest.raises(InvalidInput) as large:
        await tell(pond, run_id, "paid", "x" * 300_000)
    assert large.value.code == "too_large"
    with pytest.raises(InvalidInput):
        await tell(pond, run_id, "what/ever")
    with pytest.raises(NotFound):
        await tell(pond, new_id(), "paid")
    foreign = await pond.submit("quick", org_id=other_org)
    with pytest.raises(NotFound):
        await tell(pond, foreign, "paid")
    async with pond.worker():
        await pond.ended(run_id)
        with pytest.raises(Conflict) as late:
            await tell(pond, run_id, "paid")
    assert late.value.code == "already_finished"
    assert await pond.count("signal") == 0


async def test_many_signals_at_once_are_each_taken_once(pond: Pond) -> None:
    async def gathers(ctx: Context, count: int) -> list[int]:
        async def one(_: int) -> int:
            told: int = (await ctx.wait_event("part")).data
            return told

        return await ctx.map(one, range(count), limit=5)

    pond.flow(gathers)
    async with pond.worker():
        run_id = await pond.submit("gathers", 60)
        await asyncio.gather(*(tell(pond, run_id, "part", n) for n in range(60)))
        row = await pond.ended(run_id)
    assert sorted(row["output"]) == list(range(60))
