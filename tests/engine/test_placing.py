"""Where step functions execute: on the loop, in threads, in child processes."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine import placing_steps
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_faults import _data, _log, worker_process

from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.operations import cancel
from millpond.engine.registry import Step
from millpond.errors import InvalidInput
from millpond.retry import Retry


async def test_a_plain_function_runs_in_a_thread_and_its_progress_comes_before_its_end(
    pond: Pond,
) -> None:
    def work(step: StepContext, n: int) -> list[Any]:
        step.emit_soon("half", {"n": n})
        step.emit_soon("whole")
        return [n + 1, threading.current_thread() is threading.main_thread(), step.get(str)]

    step = pond.step(work)

    def unregistered(n: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        return n * 2

    async def use(ctx: Context, n: int) -> list[Any]:
        first = await ctx.step(step, n)
        return [first, await ctx.step("double", unregistered, n)]

    flow = pond.flow(use)
    async with pond.worker(resources={str: "a resource"}):
        run_id = await pond.submit(flow, 4)
        row = await pond.ended(run_id)
    assert row["output"] == [[5, False, "a resource"], 8]
    told = [e for e in await pond.events(run_id) if e.kind in ("progress", "step.succeeded")]
    assert [e.data["name"] for e in told] == ["half", "whole", "work", "double"]


async def test_a_thread_over_its_time_keeps_slot_and_lease_until_it_returns(pond: Pond) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def stay(step: StepContext) -> str:
        begun.set()
        may_end.wait(DEADLINE_S)
        return "too late"

    step = pond.step(stay, timeout_s=0.1, retry=Retry(max_tries=1))

    async def use(ctx: Context, _: None) -> str:
        try:
            return await ctx.step(step)
        except StepFailed as error:
            return error.code

    async def quick(ctx: Context, _: None) -> int:
        return 1

    flow, other = pond.flow(use), pond.flow(quick)
    async with pond.worker({"default": 1}):
        run_id = await pond.submit(flow)
        assert await asyncio.to_thread(begun.wait, DEADLINE_S)
        behind = await pond.submit(other)
        # Well over the time limit of the step and past the length of a lease.
        await asyncio.sleep(2.5)
        assert await pond.count("lease") == 1
        assert (await pond.run_row(behind))["started_at"] is None
        assert await pond.count("item", "state = 'queued'") == 1
        may_end.set()
        assert (await pond.ended(run_id))["output"] == "timeout"
        assert (await pond.ended(behind))["output"] == 1
    row = await pond.run_row(run_id)
    assert row["attempts"] == 1


async def test_a_cancelled_run_ends_when_its_thread_has_returned(pond: Pond) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def stay(step: StepContext) -> str:
        begun.set()
        may_end.wait(DEADLINE_S)
        return "done"

    step = pond.step(stay)

    async def use(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    flow = pond.flow(use)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert await asyncio.to_thread(begun.wait, DEADLINE_S)
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == "running"
        pond.hints.cancelled([run_id])
        await asyncio.sleep(1.2)
        assert (await pond.run_row(run_id))["outcome"] is None
        may_end.set()
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    # What the thread did is on record.
    assert await pond.count("step", "state = 'done'") == 1


async def test_a_drain_waits_for_threads_and_keeps_what_they_return(pond: Pond) -> None:
    begun, may_end = threading.Event(), threading.Event()
    calls: list[int] = []

    def stay(step: StepContext) -> str:
        calls.append(1)
        begun.set()
        may_end.wait(DEADLINE_S)
        return "once"

    step = pond.step(stay)

    async def use(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    flow = pond.flow(use)

    async def let_go() -> None:
        await asyncio.sleep(1.5)
        assert await pond.count("lease") == 1
        assert await pond.count("worker", "expires_at > clock_timestamp()") == 1
        may_end.set()

    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit(flow)
        assert await asyncio.to_thread(begun.wait, DEADLINE_S)
        letting = asyncio.create_task(let_go())
    await letting
    assert (await pond.kinds(run_id))[-1] == "run.released"
    async with pond.worker():
        assert (await pond.ended(run_id))["output"] == "once"
    assert calls == [1]


async def test_a_thread_whose_process_is_killed_is_rescued_like_any_other(
    pond: Pond, tmp_path: Path
) -> None:
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.threaded", _data(tmp_path))
        await pond.until(run_id, "step.started")
        first.kill()
        await first.wait()
    (tmp_path / "gate").touch()
    async with worker_process(pond):
        assert (await pond.ended(run_id))["output"] == 3
    assert _log(tmp_path) == ["thread", "thread"]


def _of(pond: Pond, step: Step[..., Any]) -> Step[..., Any]:
    pond.registry.add_step(step)
    return step


async def test_a_step_in_a_process_computes_apart_and_fails_by_its_own_error(pond: Pond) -> None:
    async def use(ctx: Context, n: int) -> list[Any]:
        here = await ctx.step(placing_steps.crunch, n)
        there = await ctx.step(placing_steps.crunch, n, queue="sql")
        failures = []
        for step in (placing_steps.miss, placing_steps.odd, placing_steps.ask_resource):
            try:
                await ctx.step(step)
            except StepFailed as error:
                failures.append([error.error_class, error.code])
        return [here, there, failures]

    _of(pond, placing_steps.crunch)
    flow = pond.flow(use)
    async with pond.worker({"default": 2, "sql": 1}):
        run_id = await pond.submit(flow, 1000)
        row = await pond.ended(run_id)
    here, there, failures = row["output"]
    assert here[0] == there[0] == 499_500
    assert os.getpid() not in (here[1], there[1])
    assert here[2] == f"{pond.org_id}:{run_id}:tests.crunch:0"
    assert failures == [
        ["NotFound", "row_gone"],
        ["RuntimeError", "RuntimeError"],
        ["Permanent", "no_resource"],
    ]


async def test_a_process_that_dies_fails_its_own_try_and_the_worker_lives_on(
    pond: Pond, tmp_path: Path
) -> None:
    async def use(ctx: Context, _: None) -> list[Any]:
        try:
            await ctx.step(placing_steps.die, str(tmp_path / "log"))
        except StepFailed as error:
            return [error.code, (await ctx.step(placing_steps.crunch, 10))[0]]
        return []

    flow = pond.flow(use)
    async with pond.worker() as worker:
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.started")
        session = worker.worker_id
        row = await pond.ended(run_id)
        assert worker.worker_id == session
    assert row["output"] == ["process_died", 45]
    assert row["attempts"] == 1
    assert _log(tmp_path) == ["died", "died"]


async def test_a_process_over_its_time_is_killed(pond: Pond, tmp_path: Path) -> None:
    async def use(ctx: Context, _: None) -> str:
        try:
            await ctx.step(placing_steps.spin, str(tmp_path / "pid"))
        except StepFailed as error:
            return error.code
        return ""

    flow = pond.flow(use)
    async with pond.worker():
        row = await pond.ended(await pond.submit(flow))
    assert row["output"] == "timeout"
    async with asyncio.timeout(DEADLINE_S):
        while psutil.pid_exists(int((tmp_path / "pid").read_text())):
            await asyncio.sleep(0.05)


async def test_a_function_that_cannot_run_where_it_shall_is_refused(pond: Pond) -> None:
    def inner(step: StepContext) -> None:
        return None

    async def waits(step: StepContext) -> None:
        return None

    for function, place in (
        (inner, "process"),
        (waits, "process"),
        (waits, "thread"),
        (inner, "loop"),
    ):
        with pytest.raises(InvalidInput) as refused:
            pond.step(function, runs_in=place)
        assert refused.value.param == "runs_in"
