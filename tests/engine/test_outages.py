"""Outages and bad moments: the database away, sessions gone, locks held by callers, loops that die."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import Pond

from millpond.engine import equipping, launching, storing
from millpond.engine import history as history_module
from millpond.engine.claim import Claimer
from millpond.engine.context import Context
from millpond.engine.maintenance import Maintenance
from millpond.engine.operations import cancel
from millpond.engine.slots import Slots
from millpond.errors import LeaseLost


@asynccontextmanager
async def _away(admin_url: str) -> AsyncIterator[None]:
    """Keep the engine's role out, as after a failover that is no restart."""
    admin = await asyncpg.connect(admin_url)
    await admin.execute("alter role millpond_engine nologin")
    await admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where usename = 'millpond_engine' and datname = current_database()"
    )
    try:
        yield
    finally:
        await admin.execute("alter role millpond_engine login")
        await admin.close()


@pytest.mark.xdist_group("engine-role")
async def test_an_outage_takes_no_living_workers_runs(pond: Pond, admin_url: str) -> None:
    gate = asyncio.Event()
    tries = 0

    async def holds(ctx: Context, _: None) -> int:
        async def wait() -> int:
            nonlocal tries
            tries += 1
            await gate.wait()
            return tries

        return await ctx.step("wait", wait)

    pond.flow(holds)
    async with pond.worker(lease_s=2.0):
        run_id = await pond.submit("holds")
        await pond.until(run_id, "step.started")
        async with _away(admin_url):
            await asyncio.sleep(3.0)  # longer than a lease: nobody could beat
        again = await pond.submit("holds")
        await pond.until(again, "step.started")
        gate.set()
        row = await pond.ended(run_id)
    assert row["outcome"] == "succeeded"
    assert "run.rescued" not in await pond.kinds(run_id)
    assert row["attempts"] == 1


@pytest.mark.xdist_group("engine-role")
async def test_a_commit_that_was_given_up_does_not_strand_its_run(
    pond: Pond, admin_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = functools.partial(equipping.Committer, retry_s=0.3)
    monkeypatch.setattr(equipping, "Committer", impatient)
    gate = asyncio.Event()

    async def holds(ctx: Context, _: None) -> str:
        async def wait() -> str:
            await gate.wait()
            return "done"

        return await ctx.step("wait", wait)

    pond.flow(holds)
    async with pond.worker(lease_s=30.0):
        run_id = await pond.submit("holds")
        await pond.until(run_id, "step.started")
        async with _away(admin_url):
            gate.set()
            await asyncio.sleep(1.5)  # the commit is given up meanwhile
        row = await pond.ended(run_id)
    assert row["output"] == "done"


async def test_nothing_is_claimed_under_a_session_that_is_gone(pond: Pond) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    await pond.submit(flow, 1)
    claimer = Claimer(
        pond.engine_db,
        worker_id=uuid.uuid4(),
        capabilities=[flow.capability],
        estimate_s=lambda _: 1.0,
    )
    with pytest.raises(LeaseLost):
        await claimer.claim({"default": 5})
    assert await pond.count("lease") == 0
    assert await pond.count("ready") == 1


async def test_a_stop_in_the_middle_of_a_claim_leaves_no_lease(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    is_claiming, go_on = asyncio.Event(), asyncio.Event()
    real = history_module.load

    async def slow(*args: Any) -> Any:
        is_claiming.set()
        await go_on.wait()
        return await real(*args)

    monkeypatch.setattr(launching.history, "load", slow)
    async with pond.worker():
        run_id = await pond.submit(flow, 1)
        await asyncio.wait_for(is_claiming.wait(), 20)
        asyncio.get_running_loop().call_later(0.2, go_on.set)
    assert await pond.count("lease") == 0
    monkeypatch.setattr(launching.history, "load", real)
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == 1
    assert "run.rescued" not in await pond.kinds(run_id)


async def test_a_row_that_a_caller_holds_does_not_stop_those_behind_it(pond: Pond) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    held, behind = [await pond.submit(flow, n) for n in range(2)]
    async with pond.worker({"default": 1}):
        async with pond.db.org(pond.org_id) as con:
            await cancel(con, pond.org_id, held, "user:test")
            assert (await pond.ended(behind))["output"] == 1
        assert (await pond.ended(held))["outcome"] == "cancelled"


async def test_timers_of_runs_that_are_no_more_stop_no_others(pond: Pond) -> None:
    async def naps(ctx: Context, n: int) -> int:
        await ctx.sleep(1.1)
        return n

    pond.flow(naps)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into timer select $1, gen_random_uuid(), 'x:0', 'sleep',"
            " clock_timestamp() - interval '1 hour' from generate_series(1, 1200)",
            pond.org_id,
        )
    async with pond.worker():
        row = await pond.ended(await pond.submit("naps", 7))
        async with asyncio.timeout(20):
            while await pond.count("timer"):
                await asyncio.sleep(0.05)
    assert row["output"] == 7


async def test_a_due_timer_under_a_callers_lock_does_not_spin(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    fires = 0
    real = Maintenance.fire

    async def counted(self: Maintenance) -> Any:
        nonlocal fires
        fires += 1
        return await real(self)

    monkeypatch.setattr(Maintenance, "fire", counted)

    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    run_id = await pond.submit(flow, 1, delay_s=0.2)
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await con.fetch("select from item where item_id = $1 for update", run_id)
            await asyncio.sleep(0.5)
            before = fires
            await asyncio.sleep(1.0)
            spins = fires - before
        assert (await pond.ended(run_id))["output"] == 1
    assert spins < 40


async def test_a_full_worker_sleeps_through_hints(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0
    real = Slots.free

    def counted(self: Slots) -> dict[str, int]:
        nonlocal turns
        turns += 1
        return real(self)

    monkeypatch.setattr(Slots, "free", counted)
    gate = asyncio.Event()

    async def holds(ctx: Context, _: None) -> None:
        await ctx.step("wait", gate.wait)

    pond.flow(holds)
    async with pond.worker({"default": 1}):
        first = await pond.submit("holds")
        await pond.until(first, "step.started")
        second = await pond.submit("holds")
        before = turns
        for _ in range(5):
            pond.hints.wake(["default"])
            await asyncio.sleep(0.1)
        spins = turns - before
        gate.set()
        await pond.ended(first)
        await pond.ended(second)
    assert spins < 20


async def test_an_odd_error_in_a_commit_ends_neither_the_commits_nor_the_worker(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storing.finish
    failures = 0

    async def odd(*args: Any, **options: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise RuntimeError("a bug in the block")
        return await real(*args, **options)

    monkeypatch.setattr(storing, "finish", odd)

    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    async with pond.worker():
        ids = [await pond.submit(flow, n) for n in range(6)]
        for run_id in ids:
            assert (await pond.ended(run_id))["outcome"] is not None
    assert await pond.count("lease") == 0
