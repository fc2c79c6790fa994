"""Plugs pulled one at a time: the listening connection, the heartbeat, a caller that never commits, a bad value."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import psutil
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine import executor
from millpond.engine.context import Context
from millpond.engine.events import tail
from millpond.engine.submit import submit

HELD_S = 60.0
_CUT_LISTENERS = """
select count(pg_terminate_backend(pid)) from pg_stat_activity
where application_name = 'millpond-listen' and datname = current_database()
"""


async def test_a_listener_that_dies_loses_no_event_and_no_work(pond: Pond, admin_url: str) -> None:
    async def talks(ctx: Context, count: int) -> int:
        for nth in range(count):
            await ctx.emit("said", {"nth": nth})
            await ctx.step("pause", asyncio.sleep, 0.01)
        return count

    flow = pond.flow(talks)
    admin = await asyncpg.connect(admin_url)
    cut = 0
    async with pond.worker():
        run_id = await pond.submit(flow, 60)
        others = []
        seen: list[int] = []
        async with asyncio.timeout(DEADLINE_S):
            async for event in tail(pond.db, pond.feed, pond.org_id, run_id):
                seen.append(event.event_no)
                if event.kind == "progress" and event.data["nth"] % 10 == 5:
                    cut += await admin.fetchval(_CUT_LISTENERS)
                    others.append(await pond.submit(flow, 1))
        for other in others:
            assert (await pond.ended(other))["output"] == 1
    await admin.close()
    assert seen == list(range(1, len(seen) + 1))
    assert seen[-1] == 2 + 60 * 2 + 1
    assert cut > 0


async def test_a_heartbeat_that_dies_costs_its_worker_the_session_and_no_run(pond: Pond) -> None:
    gate = asyncio.Event()

    async def holds(ctx: Context, n: int) -> list[int]:
        async def first() -> int:
            return n

        return [await ctx.step("first", first), await ctx.step("second", second)]

    async def second() -> int:
        await gate.wait()
        return 2

    pond.flow(holds)
    async with pond.worker() as worker:
        session = worker.worker_id
        run_id = await pond.submit("holds", 1)
        await pond.until(run_id, "step.started")
        [beat] = _heartbeats()
        beat.kill()
        await pond.until(run_id, "run.resumed")
        gate.set()
        row = await pond.ended(run_id)
        assert worker.worker_id != session
    assert row["output"] == [1, 2]
    kinds = await pond.kinds(run_id)
    assert kinds.count("step.succeeded") == 2
    assert await pond.count("lease") == 0


def _heartbeats() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [one for one in children if "millpond.engine.heartbeat" in one.cmdline()]


async def test_a_caller_that_holds_its_transaction_stalls_no_claim_of_any_org(
    pond: Pond, other_org: int
) -> None:
    async def quick(ctx: Context, n: int) -> int:
        await ctx.step("one", asyncio.sleep, 0)
        await ctx.sleep(1.05)
        return n

    flow = pond.flow(quick)
    mine = pond.intent(flow, -1)
    async with pond.worker({"default": 2}):
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [mine])
            # Each round asks for several claims, timers and commits while the caller holds on.
            for n in range(3):
                theirs = pond.intent(flow, n, org_id=other_org)
                async with pond.db.org(other_org) as other:
                    await submit(other, [theirs])
                assert (await pond.ended(await pond.submit(flow, n)))["output"] == n
            assert await pond.count("run", f"org_id = {other_org} and outcome is null") <= 1
            assert await pond.count("run", f"run_id = '{mine.run_id}'") == 0
        assert (await pond.ended(mine.run_id))["output"] == -1


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_caller_that_holds_its_transaction_for_a_minute_stalls_nobody(
    pond: Pond, other_org: int
) -> None:
    """Claims, timers, commits, rescue and submits of two orgs go on; what each needs is far from a minute."""

    async def quick(ctx: Context, n: int) -> int:
        await ctx.step("one", asyncio.sleep, 0)
        await ctx.sleep(1.05)
        return n

    flow = pond.flow(quick)
    mine = pond.intent(flow, -1)
    rounds, longest_s = 0, 0.0
    async with pond.worker({"default": 4}):
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [mine])
            until = time.monotonic() + HELD_S
            while time.monotonic() < until:
                began = time.monotonic()
                theirs = pond.intent(flow, rounds, org_id=other_org)
                async with pond.db.org(other_org) as other:
                    await submit(other, [theirs])
                assert (await pond.ended(await pond.submit(flow, rounds)))["output"] == rounds
                while await pond.count("run", f"run_id = '{theirs.run_id}' and outcome is null"):
                    await asyncio.sleep(0.05)
                rounds, longest_s = rounds + 1, max(longest_s, time.monotonic() - began)
            assert await pond.count("run", f"run_id = '{mine.run_id}'") == 0
        assert (await pond.ended(mine.run_id))["output"] == -1
    print(f"{rounds} rounds in {HELD_S:.0f} s, the longest {longest_s:.1f} s")
    assert longest_s < HELD_S / 4


async def test_one_value_that_postgres_refuses_fails_only_its_own_run(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = asyncio.Barrier(20)
    real = executor.dump

    def poisoned(adapter: Any, value: Any) -> str:
        return "this is not json" if value == "poison" else real(adapter, value)

    monkeypatch.setattr(executor, "dump", poisoned)

    async def says(ctx: Context, word: str) -> str:
        await ctx.step("meet", met.wait)
        return word

    flow = pond.flow(says)
    words = [f"word {n}" for n in range(10)] + ["poison"] + [f"word {n}" for n in range(10, 19)]
    async with pond.worker({"default": 20}):
        rows = [await pond.ended(run_id) for run_id in [await pond.submit(flow, w) for w in words]]
    assert [row["output"] for row in rows] == [None if w == "poison" else w for w in words]
    assert [row["outcome"] for row in rows].count("failed") == 1
    assert [row["attempts"] for row in rows] == [1] * 20
    assert await pond.count("lease") == 0
