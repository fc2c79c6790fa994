"""Faults: killed, stopped and blocked workers, stale attempts, values that cannot be stored."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.queries import queries
from millpond.engine.claim import Claimer
from millpond.engine.commit import Committer, FinishWrite, StepWrite
from millpond.engine.context import Context
from millpond.engine.duties import Duty
from millpond.engine.heartbeat import SILENT_S
from millpond.engine.leases import Lease
from millpond.engine.operations import cancel
from millpond.engine.resting import Rest, rest_alone
from millpond.engine.timers import fire
from millpond.engine.waits import back_off, release
from millpond.errors import InvalidInput, LeaseLost, MillpondError
from millpond.types import RunState

LEASE_S = 1.5


@asynccontextmanager
async def worker_process(
    pond: Pond, slots: dict[str, int] | None = None, *, silent_s: float = SILENT_S
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a worker process on the test's database; kill what is left of it in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.engine.worker_process", stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    orders = {"engine": pond.urls.engine, "lease_s": LEASE_S, "silent_s": silent_s}
    orders["slots"] = slots or {"default": 10}
    process.stdin.write(orjson.dumps(orders) + b"\n")
    await process.stdin.drain()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            await process.wait()


def _data(tmp_path: Path) -> dict[str, str]:
    return {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate")}


def _log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split()


async def test_a_killed_worker_is_taken_over_and_no_recorded_step_runs_again(
    pond: Pond, tmp_path: Path
) -> None:
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.long", _data(tmp_path))
        await pond.until(run_id, "step.started")
        first.kill()
        await first.wait()
        (tmp_path / "gate").touch()
        async with worker_process(pond):
            row = await pond.ended(run_id)
    assert row["output"] == [5, 2]
    assert row["attempts"] == 2
    assert _log(tmp_path) == ["first", "second", "second"]
    assert (await pond.kinds(run_id)).count("run.rescued") == 1


async def test_a_killed_worker_of_another_queue_is_taken_over_and_the_run_is_not_replayed(
    pond: Pond, tmp_path: Path
) -> None:
    async with worker_process(pond, {"default": 5}):
        async with worker_process(pond, {"sql": 2}) as first:
            run_id = await pond.submit("tests.elsewhere", _data(tmp_path))
            await pond.until(run_id, "step.started")
            first.kill()
            await first.wait()
        assert (await pond.run_row(run_id))["outcome"] is None
        (tmp_path / "gate").touch()
        async with worker_process(pond, {"sql": 2}):
            row = await pond.ended(run_id)
    assert row["output"] == [5, 2]
    assert row["attempts"] == 2
    assert _log(tmp_path) == ["first", "second", "second"]
    kinds = await pond.kinds(run_id)
    assert kinds.count("step.rescued") == 1
    assert "run.rescued" not in kinds
    assert await pond.count("item") == await pond.count("lease") == 0


async def test_a_stopped_worker_loses_its_lease_and_writes_nothing_when_it_wakes(
    pond: Pond, tmp_path: Path
) -> None:
    async with worker_process(pond) as first, worker_process(pond) as second:
        run_id = await pond.submit("tests.long", _data(tmp_path))
        await pond.until(run_id, "step.started")
        async with pond.engine_db.duty("test") as con:
            pid = await con.fetchval("select pid from worker join lease using (worker_id)")
        holder, other = (first, second) if first.pid == pid else (second, first)
        holder.send_signal(signal.SIGSTOP)
        await pond.until(run_id, "run.rescued")
        await pond.until(run_id, "run.resumed")
        (tmp_path / "gate").touch()
        row = await pond.ended(run_id)
        holder.send_signal(signal.SIGCONT)
        # The one that woke works again under a new session, and the old attempt left no trace.
        async with asyncio.timeout(DEADLINE_S):
            while await pond.count("worker") < 2:
                await asyncio.sleep(0.05)
        again = await pond.submit("tests.long", _data(tmp_path))
        assert (await pond.ended(again))["outcome"] == "succeeded"
        assert other.returncode is None
    assert row["attempts"] == 2
    assert (await pond.kinds(run_id)).count("run.succeeded") == 1


async def test_a_blocked_loop_keeps_its_lease(pond: Pond, tmp_path: Path) -> None:
    async with worker_process(pond), pond.worker(flows=[], lease_s=LEASE_S):
        data = {"log": str(tmp_path / "log"), "seconds": 3 * LEASE_S}
        run_id = await pond.submit("tests.blocking", data)
        row = await pond.ended(run_id)
    assert row["output"] is True
    assert row["attempts"] == 1
    assert _log(tmp_path) == ["match"]


async def test_a_step_that_blocks_the_loop_beyond_its_time_ends_the_worker_and_is_taken_over(
    pond: Pond, tmp_path: Path
) -> None:
    async with worker_process(pond, silent_s=1.0) as first:
        run_id = await pond.submit("tests.stuck", _data(tmp_path))
        assert await asyncio.wait_for(first.wait(), DEADLINE_S) == -signal.SIGKILL
        assert _log(tmp_path) == ["match"]
        async with worker_process(pond):
            row = await pond.ended(run_id)
    assert (row["output"], row["attempts"]) == (True, 2)
    assert (await pond.kinds(run_id)).count("run.rescued") == 1


async def test_sigterm_hands_work_back_to_the_next_worker(pond: Pond, tmp_path: Path) -> None:
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.long", _data(tmp_path))
        await pond.until(run_id, "step.started")
        first.terminate()
        assert await asyncio.wait_for(first.wait(), DEADLINE_S) == 0
    assert await pond.count("lease") == 0
    assert await pond.count("worker") == 0
    assert (await pond.kinds(run_id))[-1] == "run.released"


@asynccontextmanager
async def _lease(pond: Pond, count: int = 1) -> AsyncIterator[tuple[list[Lease], Committer]]:
    """Claim runs by hand, without a worker."""

    async def idle(ctx: Context, _: Any) -> None:
        return None

    flow = pond.flow(idle)
    for n in range(count):
        await pond.submit(flow, n)
    worker_id = uuid.uuid4()
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            worker_id,
            "here",
            1,
            "{}",
            [],
            600.0,
            "",
            "{}",
        )
    claimer = Claimer(
        pond.engine_db,
        worker_id=worker_id,
        capabilities=[flow.capability],
        estimate_s=lambda _: 1.0,
    )
    claimed, _ = await claimer.claim({"default": count})
    committer = Committer(pond.engine_db, pond.hints, on_cancel_requested=lambda _: None)
    committer.start()
    try:
        yield [one.lease for one in claimed], committer
    finally:
        await committer.close()


def _step(lease: Lease, output: str = "1", key: str = "s:0", *, is_new: bool = False) -> StepWrite:
    return StepWrite(
        lease=lease,
        step_key=key,
        name="s",
        state="done",
        output=output,
        event_kind="step.succeeded",
        event_data="{}",
        is_new=is_new,
    )


async def test_a_new_record_where_one_stands_fails_alone(pond: Pond) -> None:
    """It takes the place of nothing, and its event is not stored either."""
    async with _lease(pond, 3) as (leases, committer):
        await committer.record(_step(leases[1], "1", is_new=True))
        ends = await asyncio.gather(
            *(committer.record(_step(lease, "2", is_new=True)) for lease in leases),
            return_exceptions=True,
        )
    assert [isinstance(end, Exception) for end in ends] == [False, True, False]
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select run_id, output from step")
    assert {row["run_id"]: row["output"] for row in rows} == dict(
        zip([lease.run_id for lease in leases], ["2", "1", "2"], strict=True)
    )
    kinds = await pond.kinds(leases[1].run_id)
    assert kinds.count("step.succeeded") == 1


async def test_results_are_stored_the_same_alone_and_beside_other_records(pond: Pond) -> None:
    """Results of first tries alone go by a statement of their own."""
    async with _lease(pond, 4) as (leases, committer):
        alone, beside, other, _ = leases
        await committer.record(_step(alone, is_new=True))
        await asyncio.gather(
            committer.record(_step(beside, is_new=True)), committer.record(_step(other))
        )
        stale = leases[3]._replace(token=uuid.uuid4())
        with pytest.raises(LeaseLost):
            await committer.record(_step(stale, is_new=True))
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select s.run_id, s.step_key, s.name, s.kind, s.state, s.output::text, s.error::text, s.tries, s.attempt, "
            "s.seq, s.effect, s.started_at <= s.finished_at as is_over, e.event_no, e.kind as event, "
            "e.step_key as of, e.data::text from step s join event e "
            "on e.org_id = s.org_id and e.run_id = s.run_id and e.step_key = s.step_key"
        )
    stored = {row["run_id"]: tuple(row)[1:] for row in rows}
    assert set(stored) == {lease.run_id for lease in leases[:3]}
    assert stored[alone.run_id] == stored[beside.run_id] == stored[other.run_id]


async def test_results_of_runs_that_have_several_in_a_batch_are_numbered_in_order(
    pond: Pond,
) -> None:
    async with _lease(pond, 3) as (leases, committer):
        stale = leases[2]._replace(token=uuid.uuid4())
        writes = [
            _step(lease, str(nth), f"s:{nth}", is_new=True)
            for nth in range(3)
            for lease in (leases[0], leases[1], leases[2] if nth == 1 else stale)
        ]
        ends = await asyncio.gather(
            *(committer.record(write) for write in writes), return_exceptions=True
        )
        assert [type(end) for end in ends].count(LeaseLost) == 2
        stored = [7 for write in writes if write.lease is not stale]
        assert await pond.count("step") == len(stored) == 7
        for lease in leases[:2]:
            told = [one for one in await pond.events(lease.run_id) if one.kind == "step.succeeded"]
            assert [one.step_key for one in told] == ["s:0", "s:1", "s:2"]
            numbers = [one.event_no for one in await pond.events(lease.run_id)]
            assert numbers == list(range(1, len(numbers) + 1))
            assert await pond.count(
                "item", f"run_id = '{lease.run_id}' and event_no = {numbers[-1]}"
            )


async def test_a_value_with_a_separator_fails_alone(pond: Pond) -> None:
    async with _lease(pond, 3) as (leases, committer):
        outputs = ["1", '"a\x1eb"', "3"]
        ends = await asyncio.gather(
            *(
                committer.record(_step(lease, output))
                for lease, output in zip(leases, outputs, strict=True)
            ),
            return_exceptions=True,
        )
    assert [type(end) for end in ends] == [type(None), InvalidInput, type(None)]
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select run_id, output from step")
    assert {row["run_id"]: row["output"] for row in rows} == {
        leases[0].run_id: "1",
        leases[2].run_id: "3",
    }


async def test_a_stale_attempt_cannot_write(pond: Pond) -> None:
    async with _lease(pond) as ([lease], committer):
        stale = lease._replace(token=uuid.uuid4())
        for future in (
            committer.record(_step(stale)),
            committer.finish(FinishWrite(lease=stale, outcome="succeeded", event_data="{}")),
        ):
            with pytest.raises(LeaseLost):
                await future
        for write in (
            rest_alone(pond.engine_db, Rest(lease=stale, step_keys=[], is_human=False)),
            release(pond.engine_db, stale, reason="test"),
        ):
            with pytest.raises(LeaseLost):
                await write
        assert await pond.count("step") == 0
        assert await pond.count("run", "outcome is not null") == 0
        await committer.record(_step(lease))
        await committer.finish(FinishWrite(lease=lease, outcome="succeeded", event_data="{}"))
        with pytest.raises(LeaseLost):
            await committer.record(_step(lease, key="late:0"))
    assert await pond.count("step") == 1


async def test_a_run_that_shall_stop_does_not_sit_out_its_backoff(pond: Pond) -> None:
    async with _lease(pond) as ([lease], _):
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, lease.run_id, "user:test") == RunState.RUNNING
        await back_off(pond.engine_db, lease, delay_s=3600.0, error={}, tries=1)
        readied = await fire(pond.engine_db)
    assert [one.run_id for one in readied] == [lease.run_id]


async def test_one_value_that_cannot_be_stored_fails_only_its_own_write(pond: Pond) -> None:
    async with _lease(pond, 5) as (leases, committer):
        outputs = ['{"a": "\\u0000"}', "1", "this is not json", "[2]", '"fine"']
        futures = [
            committer.record(_step(one, text)) for one, text in zip(leases, outputs, strict=True)
        ]
        results = await asyncio.gather(*futures, return_exceptions=True)
    assert [isinstance(one, MillpondError) for one in results] == [False, False, True, False, False]
    assert not isinstance(results[2], LeaseLost)
    assert await pond.count("step") == 4


async def test_ends_that_are_refused_let_their_neighbours_be_told_of_once(pond: Pond) -> None:
    async with _lease(pond, 16) as (leases, committer):
        refused, ended, healthy = leases[:8], leases[8:12], leases[12:]
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                "update item set duties = $2 where item_id = any($1::uuid[])",
                [one.run_id for one in [*refused, *ended]],
                int(Duty.PARENT),
            )
        futures = [committer.record(_step(one)) for one in healthy]
        futures += [committer.finish(_end(one, "1")) for one in ended]
        futures += [committer.finish(_end(one, "this is not json")) for one in refused]
        results = await asyncio.gather(*futures, return_exceptions=True)
    assert results[:8] == [None] * 8
    assert [type(one) for one in results[8:]] == [InvalidInput] * 8
    assert await pond.count("event", "kind = 'step.succeeded'") == 4
    assert await pond.count("event", "kind = 'run.succeeded'") == 4


def _end(lease: Lease, output: str) -> FinishWrite:
    return FinishWrite(lease=lease, outcome="succeeded", output=output, event_data="{}")


async def test_events_have_no_gaps_when_branches_write_in_one_batch(pond: Pond) -> None:
    async with _lease(pond) as ([lease], committer):
        await asyncio.gather(*(committer.record(_step(lease, key=f"s:{n}")) for n in range(30)))
    numbers = [event.event_no for event in await pond.events(lease.run_id)]
    assert numbers == list(range(1, 33))


async def test_a_value_with_a_nul_from_a_model_is_stored_and_read_back(pond: Pond) -> None:
    async def odd(ctx: Context, _: None) -> str:
        async def model() -> str:
            return "before\x00after"

        text = await ctx.step("model", model)
        await ctx.sleep(1.1)
        return text

    pond.flow(odd)
    async with pond.worker():
        row = await pond.ended(await pond.submit("odd"))
    assert row["outcome"] == "succeeded"
    assert row["output"] == "before\x00after"


async def test_an_output_that_is_no_json_fails_the_run_with_its_field(pond: Pond) -> None:
    async def odd(ctx: Context, _: None) -> Any:
        return object()

    pond.flow(odd)
    async with pond.worker():
        row = await pond.ended(await pond.submit("odd"))
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "not_json"


async def test_a_callers_open_transaction_stalls_nobody(pond: Pond) -> None:
    async def quick(ctx: Context, n: int) -> int:
        return n

    flow = pond.flow(quick)
    from millpond.engine.submit import submit

    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            mine = pond.intent(flow, 1)
            await submit(con, [mine])
            for n in range(5):
                assert (await pond.ended(await pond.submit(flow, n)))["output"] == n
        assert (await pond.ended(mine.run_id))["output"] == 1


async def test_broken_connections_lose_nothing(pond: Pond, admin_url: str) -> None:
    async def three(ctx: Context, n: int) -> int:
        async def add(value: int) -> int:
            await asyncio.sleep(0.02)
            return value + 1

        for _ in range(3):
            n = await ctx.step("add", add, n)
        return n

    flow = pond.flow(three)
    admin = await asyncpg.connect(admin_url)
    async with pond.worker({"default": 10}):
        ids = [await pond.submit(flow, n) for n in range(60)]
        for _ in range(6):
            await admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where usename = 'millpond_engine' and datname = current_database()"
            )
            await asyncio.sleep(0.15)
        outputs = [(await pond.ended(run_id))["output"] for run_id in ids]
    await admin.close()
    assert outputs == [n + 3 for n in range(60)]
    assert await pond.count("lease") == 0
    assert await pond.count("step") == 180
