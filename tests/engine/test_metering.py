"""Metering: runs, worker-seconds, tokens and cost of days are what really happened, once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from millpond.db.pool import Record
from millpond.engine import metering, quotas
from millpond.engine.context import Context, StepContext
from millpond.engine.maintenance import Maintenance
from millpond.errors import InvalidInput, Permanent, Transient
from millpond.retry import Retry

from .conftest import Pond
from .test_children import cancel
from .test_faults import worker_process

PRICE = (3_000_000, 15_000_000)


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    await con.execute("insert into model_price values ('m', $1, $2)", *PRICE)
    yield con
    await con.close()


async def days(
    pond: Pond, admin: asyncpg.Connection, org: int | None = None
) -> dict[tuple[str, str], Record]:
    """Fold what is there, and read an org's days by flow and model."""
    await metering.fold(pond.engine_db)
    rows = await admin.fetch("select * from usage_day where org_id = $1", org or pond.org_id)
    return {(row["flow"], row["model"]): row for row in rows}


async def test_runs_and_worker_seconds_are_counted_once_however_often_a_run_waits(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    async def resting(ctx: Context, _: None) -> None:
        await asyncio.sleep(0.1)
        await ctx.sleep(1.2)
        await asyncio.sleep(0.1)

    flow = pond.flow(resting)
    async with pond.worker():
        ids = [await pond.submit(flow) for _ in range(5)]
        for run_id in ids:
            assert (await pond.ended(run_id))["attempts"] == 2
    row = (await days(pond, admin))["resting", ""]
    assert row["runs"] == 5
    # Two attempts each, both with the first pause: the wait itself holds no worker.
    assert 5 * 0.3 <= row["worker_s"] < 5 * 1.2


async def test_two_folding_at_once_count_each_part_once(
    pond: Pond, other_org: int, admin: asyncpg.Connection
) -> None:
    async def noop(ctx: Context, _: None) -> None:
        pass

    flow = pond.flow(noop)
    async with pond.worker({"default": 50}):
        ids = [await pond.submit(flow) for _ in range(60)]
        ids += [await pond.submit(flow, org_id=other_org) for _ in range(30)]
        async with asyncio.timeout(20):
            while await pond.count("item"):
                await asyncio.gather(*(metering.fold(pond.engine_db) for _ in range(3)))
    assert (await days(pond, admin))["noop", ""]["runs"] == 60
    assert (await days(pond, admin, other_org))["noop", ""]["runs"] == 30
    assert await admin.fetchval("select count(*) from usage_part") == 0


async def test_what_was_spent_on_models_is_folded_alone_or_with_the_rest(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    for model, runs in ((None, 1), ("m", None)):
        await admin.execute(
            "insert into usage_part (orgs, flows, models, runs, input_tokens)"
            " values (array[$1::bigint], '{asking}', nullif(array[$2::text], '{null}'),"
            " nullif(array[$3::int], '{null}'), nullif(array[$4::bigint], '{null}'))",
            *(pond.org_id, model, runs, 7 if model else None),
        )
    assert not await metering.fold(pond.engine_db, only_spent=True)
    assert [row["model"] for row in await admin.fetch("select model from usage_day")] == ["m"]
    assert await admin.fetchval("select count(*) from usage_part") == 1
    found = await days(pond, admin)
    assert {model: (row["runs"], row["input_tokens"]) for (_, model), row in found.items()} == {
        "m": (0, 7),
        "": (1, 0),
    }


async def test_a_try_that_asked_the_model_is_counted_and_a_replay_is_not(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """The first try asks and fails after it, the second succeeds; then the run waits and is replayed."""
    asked = 0

    async def ask(step: StepContext) -> str:
        nonlocal asked
        asked += 1
        step.spend("m", input_tokens=100, output_tokens=10)
        if asked == 1:
            raise Transient("the answer was cut off")
        return "done"

    async def asking(ctx: Context, _: None) -> str:
        answer: str = await ctx.step(step)
        await ctx.sleep(1.1)
        return answer

    step = pond.step(ask, retry=Retry(max_tries=3, base_s=0.01))
    flow = pond.flow(asking)
    async with pond.worker():
        run = await pond.ended(await pond.submit(flow))
    assert (run["outcome"], run["attempts"], asked) == ("succeeded", 2, 2)
    row = (await days(pond, admin))["asking", "m"]
    assert (row["runs"], row["input_tokens"], row["output_tokens"]) == (0, 200, 20)
    assert row["cost_micros"] == 200 * 3 + 20 * 15


async def test_what_a_failed_step_and_one_in_another_queue_spent_is_counted(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    async def ask(step: StepContext, how: str) -> str:
        step.spend("m", input_tokens=7, output_tokens=0)
        step.spend("free", input_tokens=1, output_tokens=1)
        if how == "badly":
            raise Permanent("no use")
        return "done"

    async def asking(ctx: Context, _: None) -> str:
        await ctx.step(step, "well", queue="llm")
        await ctx.step(step, "badly")
        return "never"

    step = pond.step(ask)
    flow = pond.flow(asking)
    async with pond.worker({"default": 2, "llm": 2}):
        run = await pond.ended(await pond.submit(flow))
    assert run["outcome"] == "failed"
    found = await days(pond, admin)
    assert found["asking", "m"]["input_tokens"] == 14
    assert found["asking", "m"]["cost_micros"] == 14 * 3
    assert found["asking", "free"]["cost_micros"] == 0
    assert found["asking", ""]["runs"] == 1


async def test_what_cannot_be_counted_fails_the_step(pond: Pond, admin: asyncpg.Connection) -> None:
    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=-1, output_tokens=0)

    async def asking(ctx: Context, _: None) -> None:
        await ctx.step(step)

    step = pond.step(ask)
    flow = pond.flow(asking)
    async with pond.worker():
        run = await pond.ended(await pond.submit(flow))
    assert run["error"]["code"] == "invalid_input"
    assert ("asking", "m") not in await days(pond, admin)


async def _next_beat(admin: asyncpg.Connection) -> datetime:
    """Wait for the next heartbeat of the only worker; returns when it was."""
    first: datetime = await admin.fetchval("select max(beat_at) from worker")
    async with asyncio.timeout(20):
        while (beat_at := await admin.fetchval("select max(beat_at) from worker")) == first:
            await asyncio.sleep(0.02)
    assert isinstance(beat_at, datetime)
    return beat_at


async def test_the_sum_is_the_truth_after_a_worker_was_killed(
    pond: Pond, admin: asyncpg.Connection, tmp_path: Path
) -> None:
    """Runs are counted once; the dead worker's time counts until its last heartbeat."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    data = {"log": str(log), "gate": str(gate)}
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.long", data)
        await pond.until(run_id, "step.started")
        beat_at = await _next_beat(admin)
        first.kill()
        await first.wait()
        gate.touch()
        async with worker_process(pond):
            run = await pond.ended(run_id)
    assert run["attempts"] == 2
    row = (await days(pond, admin))["tests.long", ""]
    assert row["runs"] == 1
    took_s = (run["finished_at"] - run["started_at"]).total_seconds()
    heard_s = (beat_at - run["started_at"]).total_seconds()
    # The second attempt reaches the end of the flow at once.
    assert heard_s > 0.2
    assert heard_s - 0.1 <= row["worker_s"] < took_s


async def test_the_end_of_a_stale_attempt_counts_nothing(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """Its lease went to another attempt while it was at work: only that one ends the run, and is counted."""
    tries = 0
    is_begun = asyncio.Event()

    async def noop(ctx: Context, _: None) -> None:
        nonlocal tries
        tries += 1
        is_begun.set()
        await asyncio.sleep(0.5)

    flow = pond.flow(noop)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await is_begun.wait()
        await admin.execute("delete from lease")
        await admin.execute("update item set token = gen_random_uuid() where item_id = $1", run_id)
        await admin.execute(
            "insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)"
            " select org_id, item_id, run_id, lane_id, 'default', '{}', gen_random_uuid(), attempt, token from item"
        )
        await pond.ended(run_id)
    row = (await days(pond, admin))["noop", ""]
    assert (row["runs"], tries) == (1, 2)


@pytest.mark.parametrize("orgs", [3])
async def test_no_part_is_lost_when_many_orgs_end_runs_together(
    pond: Pond, admin: asyncpg.Connection, orgs: int
) -> None:
    async def noop(ctx: Context, _: None) -> None:
        pass

    flow = pond.flow(noop)
    made = [
        await admin.fetchval(
            "insert into org (slug, name) values ($1, $1) returning org_id", f"o{n}"
        )
        for n in range(orgs)
    ]
    async with pond.worker({"default": 50}):
        for _ in range(30):
            for org_id in made:
                await pond.submit(flow, org_id=org_id)
        async with asyncio.timeout(20):
            while await pond.count("item"):
                await asyncio.sleep(0.02)
    for org_id in made:
        assert (await days(pond, admin, org_id))["noop", ""]["runs"] == 30


async def test_numbers_of_one_org_that_are_too_large_stop_no_other(
    pond: Pond, other_org: int, admin: asyncpg.Connection
) -> None:
    """Sums stay the largest number that JSON has; what cannot be added at all is dropped alone."""
    insert = (
        "insert into usage_part (orgs, flows, models, input_tokens, output_tokens, cost_micros)"
        " select array[$1::bigint], array[$2::text], array['m'], of, of, of from (select array[$3::bigint] as of) u"
    )
    for _ in range(3):
        await admin.execute(insert, other_org, "large", 2**63 - 1)
    await admin.execute(insert, other_org, None, 1)
    await admin.execute(insert, pond.org_id, "small", 7)
    assert (await days(pond, admin))["small", "m"]["input_tokens"] == 7
    large = await days(pond, admin, other_org)
    assert list(large) == [("large", "m")]
    assert large["large", "m"]["cost_micros"] == 2**53 - 1
    assert await admin.fetchval("select count(*) from usage_part") == 0
    async with pond.db.org(other_org) as con:
        spent = await quotas.read_used(con, other_org, {"tokens_per_month": 1})
    assert [one.used for one in spent] == [2**53 - 1]


@pytest.mark.parametrize("tokens", [2**31, 2**63])
async def test_more_tokens_than_a_call_can_use_are_refused(tokens: int) -> None:
    with pytest.raises(InvalidInput):
        metering.Spent("m", tokens, 0).check()


async def test_the_time_of_a_dead_worker_with_many_leases_is_counted_for_each(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """Its session is gone since the first batch: of the others it was silent for a lease."""

    async def noop(ctx: Context, _: None) -> None:
        pass

    flow = pond.flow(noop)
    for _ in range(2):
        await pond.submit(flow)
    await admin.execute("update item set state = 'running', token = gen_random_uuid()")
    await admin.execute(
        "insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token, claimed_at)"
        " select org_id, item_id, run_id, lane_id, 'default', '{}', gen_random_uuid(), 1, token,"
        " clock_timestamp() - interval '100 s' from item"
    )
    # Nobody is given up within a lease of the server's start, which may be this test's own.
    await admin.execute(
        "select pg_sleep(greatest(0, 1.1 - extract(epoch from clock_timestamp() - pg_postmaster_start_time())))"
    )
    assert len(await Maintenance(pond.engine_db, lease_s=1.0).rescue()) == 2
    row = (await days(pond, admin))["noop", ""]
    assert 2 * 99 <= row["worker_s"] < 2 * 105


@pytest.mark.parametrize("ending", ["none", "at once", "after a wait"])
async def test_what_a_step_spent_before_its_run_was_cancelled_is_counted(
    pond: Pond, admin: asyncpg.Connection, ending: str
) -> None:
    has_spent = asyncio.Event()

    async def undo(step: StepContext, done: str) -> None:
        if ending == "after a wait" and step.try_number == 1:
            raise Transient("not yet", retry_after_s=1.1)

    async def first(step: StepContext) -> str:
        return "done"

    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=100, output_tokens=10)
        has_spent.set()
        await asyncio.sleep(60)

    async def asking(ctx: Context, _: None) -> None:
        if ending != "none":
            await ctx.step(one, undo=back)
        await ctx.step(step)

    back, one, step = pond.step(undo), pond.step(first), pond.step(ask)
    flow = pond.flow(asking)
    async with pond.worker():
        run_id = await pond.submit(flow)
        async with asyncio.timeout(20):
            await has_spent.wait()
        await cancel(pond, run_id)
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    row = (await days(pond, admin))["asking", "m"]
    assert (row["input_tokens"], row["output_tokens"]) == (100, 10)


@pytest.mark.parametrize("end", ["succeeds", "fails", "waits", "backs off", "hands over", "undoes"])
async def test_what_a_step_spent_before_the_flow_gave_it_up_is_counted(
    pond: Pond, admin: asyncpg.Connection, end: str
) -> None:
    """A time limit of the flow's own cuts a try: nothing is recorded of it, but the model has answered."""
    asked = 0

    async def ask(step: StepContext) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:  # a replay of the flow tries it again
            step.spend("m", input_tokens=100, output_tokens=10)
        await asyncio.sleep(60)

    async def first(step: StepContext) -> None:
        pass

    async def asking(ctx: Context, successors: int) -> None:
        if successors:
            return
        if end == "undoes":
            await ctx.step(done, undo=back)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await ctx.step(step)
        match end:
            case "fails" | "undoes":
                raise Permanent("it ends here")
            case "waits":
                await ctx.sleep(1.1)
            case "backs off" if asked == 1:
                raise Transient("once more", retry_after_s=0.01)
            case "hands over":
                await ctx.continue_as(1)

    async def undo(step: StepContext, _: None) -> None:
        pass

    step, done, back = pond.step(ask), pond.step(first), pond.step(undo)
    flow = pond.flow(asking, retry=Retry(max_tries=2, base_s=0.01))
    async with pond.worker():
        await pond.submit(flow, 0)
        async with asyncio.timeout(20):
            while await pond.count("item"):
                await asyncio.sleep(0.02)
    row = (await days(pond, admin))["asking", "m"]
    assert (row["input_tokens"], row["output_tokens"]) == (100, 10)


async def test_what_a_step_spent_before_its_worker_stopped_is_counted(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """The next worker tries the step again, and that is counted too: the model was asked twice."""
    tries = 0
    has_spent = asyncio.Event()

    async def ask(step: StepContext) -> None:
        nonlocal tries
        tries += 1
        step.spend("m", input_tokens=100, output_tokens=10)
        has_spent.set()
        if tries == 1:
            await asyncio.sleep(60)

    async def asking(ctx: Context, _: None) -> None:
        await ctx.step(step)

    step = pond.step(ask)
    flow = pond.flow(asking)
    async with pond.worker(drain_s=0.05):
        run_id = await pond.submit(flow)
        async with asyncio.timeout(20):
            await has_spent.wait()
    assert (await days(pond, admin))["asking", "m"]["input_tokens"] == 100
    async with pond.worker():
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    assert (await days(pond, admin))["asking", "m"]["input_tokens"] == 200


async def test_what_was_spent_is_counted_once_when_an_ending_is_cut_by_its_worker(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """With how the run ends it is stored; the worker stops while it undoes, and another one ends the run."""
    has_begun = asyncio.Event()

    async def first(step: StepContext) -> None:
        pass

    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=100, output_tokens=10)
        await asyncio.sleep(60)

    async def undo(step: StepContext, _: None) -> None:
        if not has_begun.is_set():
            has_begun.set()
            await asyncio.sleep(60)

    async def asking(ctx: Context, _: None) -> None:
        await ctx.step(done, undo=back)
        await ctx.step(step)

    done, step, back = pond.step(first), pond.step(ask), pond.step(undo)
    flow = pond.flow(asking, timeout_s=0.2)
    async with pond.worker(drain_s=0.05):
        run_id = await pond.submit(flow)
        async with asyncio.timeout(20):
            await has_begun.wait()
    async with pond.worker():
        assert (await pond.ended(run_id))["outcome"] == "failed"
    row = (await days(pond, admin))["asking", "m"]
    assert (row["input_tokens"], row["output_tokens"]) == (100, 10)


async def test_what_a_try_spent_is_counted_when_it_is_cut_after_its_end(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    """A time limit of the flow's own ends the wait for what is told of the failure before it is recorded."""

    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=100, output_tokens=10)
        raise Transient("too much", details={"status": 429}, limit_keys=["provider:one"])

    async def asking(ctx: Context, _: None) -> str:
        try:
            async with asyncio.timeout(0.2):
                await ctx.step(step)
        except TimeoutError:
            return "cut"
        return "not cut"

    step = pond.step(ask)
    flow = pond.flow(asking)
    async with pond.engine_db.duty("test") as con:
        await con.execute("select pg_advisory_xact_lock(7741003)")
        async with pond.worker():
            assert (await pond.ended(await pond.submit(flow)))["output"] == "cut"
    row = (await days(pond, admin))["asking", "m"]
    assert (row["input_tokens"], row["output_tokens"]) == (100, 10)


async def test_what_a_try_spent_is_counted_when_its_result_is_refused(
    pond: Pond, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'refused'; end $$;"
        " create trigger refuse before insert on step for each row"
        " when (new.output::text like '%unwelcome%') execute function refuse()"
    )

    async def ask(step: StepContext) -> str:
        step.spend("m", input_tokens=100, output_tokens=10)
        return "unwelcome words"

    async def asking(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    step = pond.step(ask)
    flow = pond.flow(asking)
    async with pond.worker():
        assert (await pond.ended(await pond.submit(flow)))["outcome"] == "failed"
    row = (await days(pond, admin))["asking", "m"]
    assert (row["input_tokens"], row["output_tokens"]) == (100, 10)
