"""Poison that is not the run's own, but a step's in another queue or a child's: what a release does again."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.queries import queries
from millpond.engine import reruns, timers, waits
from millpond.engine.claim import Claimer
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.lanes import ALONE
from millpond.engine.maintenance import Maintenance
from millpond.engine.reruns import Repeat
from millpond.engine.worker import Worker
from millpond.errors import Conflict

LEASE_S = 2.0


async def _die_alone(pond: Pond, queue: str, capability: str) -> None:
    """Claim what is queued there, as a process that has it alone, and die; again if that was not counted."""
    item_id = None
    while item_id is None or await pond.count("item", f"item_id = '{item_id}'"):
        worker_id = uuid.uuid4()
        async with pond.engine_db.duty("test") as con:
            sql = queries("maintenance")["register_worker"]
            await con.execute(sql, worker_id, "here", 1, "{}", [], 600.0, "", "{}")
        claimer = Claimer(
            pond.engine_db,
            worker_id=worker_id,
            capabilities=[capability, f"{capability}{ALONE}"],
            estimate_s=lambda _: 1.0,
        )
        [claimed], _ = await claimer.claim({queue: 1})
        item_id = claimed.lease.item_id
        async with pond.engine_db.duty("test") as con:
            await con.execute("update item set deaths = 2 where item_id = $1", item_id)
            await con.execute("delete from worker where worker_id = $1", worker_id)
        maintenance = Maintenance(pond.engine_db, lease_s=LEASE_S)
        async with asyncio.timeout(DEADLINE_S):
            while await pond.count("lease", f"item_id = '{item_id}'"):
                await maintenance.rescue()
                await asyncio.sleep(0.05)


async def _until_deaths_count(pond: Pond) -> None:
    async with asyncio.timeout(DEADLINE_S), pond.engine_db.statement("test") as con:
        await con.execute(
            "select pg_sleep(greatest(0, $1 - extract(epoch from"
            " clock_timestamp() - pg_postmaster_start_time())))",
            1.5 * LEASE_S,
        )


async def _release(pond: Pond, run_id: uuid.UUID) -> uuid.UUID:
    """Do what POST /v1/runs/{run_id}/release does, and see that the start is taken for due."""
    async with pond.db.org(pond.org_id) as con:
        source = await reruns.read(con, pond.org_id, run_id)
        reruns.check_poison(source)
        repeat = Repeat(
            version=1, timeout_s=None, subject=source.subject, input=source.input, keeps_all=True
        )
        intent = await reruns.rerun(con, source, repeat)
    async with asyncio.timeout(DEADLINE_S):
        while not await timers.fire(pond.engine_db):
            await asyncio.sleep(0.02)
    return intent.run_id


async def _alone(pond: Pond, queue: str) -> bool:
    """Execute one suspect of a queue, as a process of its own does; tells whether there was one."""
    worker = Worker(
        database=pond.engine_db,
        engine_url=pond.urls.engine,
        listen_url=pond.urls.engine,
        flows=list(pond.registry.flows.values()),
        steps=list(pond.registry.steps.values()),
        slots={queue: 1},
        lease_s=LEASE_S,
        alone=True,
    )
    await asyncio.wait_for(worker.run(asyncio.Event()), DEADLINE_S)
    return worker.has_worked


async def test_a_run_that_failed_by_a_poisoned_step_elsewhere_does_that_step_again_alone(
    pond: Pond,
) -> None:
    calls: list[str] = []

    async def first(step: StepContext) -> str:
        calls.append("first")
        return "first"

    async def heavy(step: StepContext) -> str:
        calls.append("heavy")
        return "heavy"

    begin, lift = pond.step(first), pond.step(heavy, queue="sql")

    async def lifts(ctx: Context, _: None) -> list[str]:
        return [await ctx.step(begin), await ctx.step(lift)]

    flow = pond.flow(lifts)
    await _until_deaths_count(pond)
    async with pond.worker({"default": 2}):
        poisoned = await pond.submit(flow)
        await pond.until(poisoned, "run.waiting")
        await _die_alone(pond, "sql", lift.capability)
        row = await pond.ended(poisoned)
    assert row["error"]["code"] == "poison"
    released = await _release(pond, poisoned)
    assert await _alone(pond, "default")
    # It takes down nobody else if it is as bad as before.
    assert await pond.count("item", "kind = 'step' and deaths = 2 and lane_id & 2 = 2") == 1
    assert await _alone(pond, "sql")
    async with pond.worker({"default": 2}):
        assert (await pond.ended(released))["output"] == ["first", "heavy"]
    assert calls == ["first", "heavy"]


async def test_what_was_undone_before_a_poisoned_run_ended_is_done_again_after_its_release(
    pond: Pond,
) -> None:
    done: list[str] = []

    async def book(step: StepContext) -> str:
        done.append("book")
        return "seat"

    async def unbook(step: StepContext, seat: str) -> None:
        done.append("unbook")

    async def heavy(step: StepContext) -> str:
        return "heavy"

    reserve, cancel = pond.step(book), pond.step(unbook)
    lift = pond.step(heavy, queue="sql")

    async def lifts(ctx: Context, _: None) -> str:
        await ctx.step(reserve, undo=cancel)
        return await ctx.step(lift)

    flow = pond.flow(lifts)
    await _until_deaths_count(pond)
    async with pond.worker({"default": 2}):
        poisoned = await pond.submit(flow)
        await pond.until(poisoned, "run.waiting")
        await _die_alone(pond, "sql", lift.capability)
        assert (await pond.ended(poisoned))["error"]["code"] == "poison"
    released = await _release(pond, poisoned)
    assert await _alone(pond, "default")
    assert await _alone(pond, "sql")
    async with pond.worker({"default": 2}):
        assert (await pond.ended(released))["output"] == "heavy"
    assert done == ["book", "unbook", "book"]


async def test_a_poisoned_step_that_the_flow_had_gone_on_without_stays_as_it_was(
    pond: Pond,
) -> None:
    async def heavy(step: StepContext) -> str:
        return "heavy"

    async def light(step: StepContext) -> str:
        return "light"

    lift, instead = pond.step(heavy, queue="sql"), pond.step(light)

    async def lifts(ctx: Context, _: None) -> str:
        try:
            return await ctx.step(lift)
        except StepFailed:
            result = await ctx.step(instead)
        await ctx.wait_event("go", timeout_s=600)
        return result

    flow = pond.flow(lifts)
    await _until_deaths_count(pond)
    async with pond.worker({"default": 2}):
        poisoned = await pond.submit(flow)
        await pond.until(poisoned, "run.waiting")
        await _die_alone(pond, "sql", lift.capability)
        await pond.until(poisoned, "step.succeeded")
        await pond.until(poisoned, "run.waiting", nth=2)
    # Then it takes its worker down itself.
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from item")
        sql = "update run set outcome = 'failed', finished_at = clock_timestamp(), error = $1"
        await con.execute(sql, '{"class": "Poison", "code": "poison"}')
    released = await _release(pond, poisoned)
    assert await _alone(pond, "default")
    assert await pond.count("step", f"run_id = '{released}' and state = 'failed'") == 1
    assert (await pond.kinds(released))[-1] == "run.waiting"


async def test_of_two_poisoned_steps_the_one_is_done_again_that_failed_the_run(pond: Pond) -> None:
    calls: list[str] = []

    async def heavy(step: StepContext) -> None:
        calls.append("heavy")

    async def heavier(step: StepContext) -> str:
        calls.append("heavier")
        return "lifted"

    lift, heave = pond.step(heavy, queue="sql"), pond.step(heavier, queue="sql")

    async def lifts(ctx: Context, _: None) -> str:
        with contextlib.suppress(StepFailed):
            await ctx.step(lift)
        return await ctx.step(heave)

    flow = pond.flow(lifts)
    await _until_deaths_count(pond)
    async with pond.worker({"default": 2}):
        poisoned = await pond.submit(flow)
        await pond.until(poisoned, "run.waiting")
        await _die_alone(pond, "sql", lift.capability)
        await pond.until(poisoned, "run.waiting", nth=2)
        await _die_alone(pond, "sql", heave.capability)
        row = await pond.ended(poisoned)
    assert (row["error"]["code"], row["error"]["step"]) == ("poison", "heavier")
    released = await _release(pond, poisoned)
    assert await _alone(pond, "default")
    assert (
        await pond.count("step", f"run_id = '{released}' and name = 'heavy' and state = 'failed'")
        == 1
    )
    assert await _alone(pond, "sql")
    async with pond.worker({"default": 2}):
        assert (await pond.ended(released))["output"] == "lifted"
    assert calls == ["heavier"]


async def test_an_ordinary_rerun_that_is_executed_alone_makes_no_suspects_of_its_steps(
    pond: Pond,
) -> None:
    async def heavy(step: StepContext) -> str:
        return "heavy"

    lift = pond.step(heavy, queue="sql")

    async def lifts(ctx: Context, _: None) -> str:
        return await ctx.step(lift)

    flow = pond.flow(lifts)
    async with pond.worker({"default": 2, "sql": 1}):
        first = await pond.submit(flow)
        await pond.ended(first)
    async with pond.db.org(pond.org_id) as con:
        source = await reruns.read(con, pond.org_id, first)
        repeat = Repeat(version=1, timeout_s=None, subject=source.subject, input=source.input)
        again = (await reruns.rerun(con, source, repeat)).run_id
    # Two workers died under it, it is not known why.
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from ready where item_id = $1", again)
        await con.execute(
            "update item set deaths = 2, state = 'scheduled' where item_id = $1", again
        )
        wake = waits.Wake(org_id=pond.org_id, run_id=again)
        assert await waits.ready(con, [wake])
    assert await pond.count("item", "kind = 'run' and lane_id & 2 = 2") == 1
    assert await _alone(pond, "default")
    assert await pond.count("item", "kind = 'step' and deaths = 0 and lane_id & 2 = 0") == 1


async def test_a_run_that_failed_by_a_poisoned_child_names_the_child_to_release(pond: Pond) -> None:
    async def child(ctx: Context, _: None) -> str:
        return "child"

    inner = pond.flow(child, queue="sql")

    async def parent(ctx: Context, _: None) -> str:
        result: str = await ctx.run_flow(inner)
        return result

    flow = pond.flow(parent)
    await _until_deaths_count(pond)
    async with pond.worker({"default": 2}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.waiting")
        await _die_alone(pond, "sql", inner.capability)
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "poison"
    started = [e.data for e in await pond.events(run_id) if e.kind == "child.started"]
    child_id = uuid.UUID(started[0]["run_id"])
    with pytest.raises(Conflict) as refused:
        await _release(pond, run_id)
    assert refused.value.code == "poisoned_child"
    assert str(child_id) in str(refused.value)
    assert str(child_id) in (refused.value.advice or "")
    released = await _release(pond, child_id)
    assert await _alone(pond, "sql")
    assert (await pond.ended(released))["output"] == "child"
