"""Steps in other queues: work items of their own, executed alone by workers there."""

from __future__ import annotations

import asyncio
import uuid
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.queries import queries
from millpond.engine import remote
from millpond.engine.claim import Claimer
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.operations import cancel
from millpond.engine.remote import RemoteWrite, settle
from millpond.errors import InvalidInput, Permanent, Transient
from millpond.retry import Retry


class Query(BaseModel):
    text: str
    since: date


class Handle:
    """Something that has no JSON form."""


async def _gone(pond: Pond, table: str, where: str = "true") -> None:
    """Wait until no row is left."""
    async with asyncio.timeout(DEADLINE_S):
        while await pond.count(table, where):
            await asyncio.sleep(0.02)


async def test_a_step_in_another_queue_is_executed_there_without_replaying_the_flow(
    pond: Pond,
) -> None:
    seen: list[Any] = []
    bodies = 0

    async def run_sql(step: StepContext, query: Query, *limits: int, dry: bool = False) -> Query:
        seen.append((query, limits, dry, step.idempotency_key, step.try_number, step.subject))
        await step.emit("reading", {"rows": 3})
        return Query(text=query.text.upper(), since=query.since)

    step = pond.step(run_sql, queue="sql")

    async def ask(ctx: Context, _: None) -> str:
        nonlocal bodies
        bodies += 1
        given = Query(text="select", since=date(2026, 1, 2))
        answer = await ctx.step(step, given, 1, 2, dry=True)
        return f"{answer.text} {answer.since.year}"

    flow = pond.flow(ask)
    async with pond.worker({"default": 5}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.waiting")
        assert await pond.count("item", "kind = 'step' and state = 'queued' and queue = 'sql'") == 1
        async with pond.worker({"sql": 2}, flows=[]):
            row = await pond.ended(run_id)
    assert row["output"] == "SELECT 2026"
    key = f"{pond.org_id}:{run_id}:run_sql:0"
    assert seen == [
        (Query(text="select", since=date(2026, 1, 2)), (1, 2), True, key, 1, "user:test")
    ]
    assert bodies == 2  # the flow, and its replay with the result
    events = await pond.events(run_id)
    assert [event.event_no for event in events] == list(range(1, len(events) + 1))
    # A step that lasts for a while, as on a busy machine, also tells of its start.
    events = [event for event in events if event.kind != "step.started"]
    assert [event.kind for event in events] == [
        "run.queued",
        "run.started",
        "step.queued",
        "run.waiting",
        "progress",
        "step.succeeded",
        "run.resumed",
        "run.succeeded",
    ]
    assert events[2].data == {"name": "run_sql", "queue": "sql"}
    assert events[5].data["queue"] == "sql"
    assert await pond.count("item") == await pond.count("lease") == await pond.count("ready") == 0


async def test_a_step_named_into_the_runs_own_queue_stays_in_its_attempt(pond: Pond) -> None:
    async def double(step: StepContext, n: int) -> int:
        return 2 * n

    step = pond.step(double)

    async def calc(ctx: Context, n: int) -> list[int]:
        here = await ctx.step(step, n, queue="default")
        there = await ctx.step(step, here, queue="sql")
        return [here, there]

    flow = pond.flow(calc)
    async with pond.worker({"default": 5, "sql": 1}):
        row = await pond.ended(await pond.submit(flow, 4))
    assert row["output"] == [8, 16]
    assert row["attempts"] == 2


async def test_many_branches_go_elsewhere_and_each_gets_its_own_result(pond: Pond) -> None:
    async def square(step: StepContext, n: int) -> int:
        return n * n

    step = pond.step(square, queue="sql")

    async def fan(ctx: Context, n: int) -> list[int]:
        return list(await ctx.parallel(*(ctx.step(step, one) for one in range(n))))

    flow = pond.flow(fan)
    async with pond.worker({"default": 5}), pond.worker({"sql": 4}, flows=[]):
        ids = [await pond.submit(flow, 12) for _ in range(5)]
        rows = [await pond.ended(run_id) for run_id in ids]
    assert [row["output"] for row in rows] == [[n * n for n in range(12)]] * 5
    for run_id in ids:
        numbers = [event.event_no for event in await pond.events(run_id)]
        assert numbers == list(range(1, len(numbers) + 1))
    assert await pond.count("item") == await pond.count("lease") == 0


async def test_failures_elsewhere_are_tried_again_by_the_steps_own_policy(pond: Pond) -> None:
    tries: list[int] = []

    async def flaky(step: StepContext, fails: int) -> int:
        tries.append(step.try_number)
        if len(tries) <= fails:
            raise Transient("busy", retry_after_s=1.2 if len(tries) == 2 else None)
        return len(tries)

    step = pond.step(flaky, queue="sql", retry=Retry(base_s=0.01))

    async def ask(ctx: Context, _: None) -> int:
        return await ctx.step(step, 2)

    flow = pond.flow(ask)
    async with pond.worker({"default": 5}), pond.worker({"sql": 1}, flows=[]):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "step.retrying", nth=2)
        # The long backoff holds neither slot nor lease, and the run does not go on before.
        await _gone(pond, "lease", "item_id <> run_id")
        assert await pond.count("timer") == 1
        row = await pond.ended(run_id)
    assert row["output"] == 3
    assert row["attempts"] == 2
    assert tries == [1, 2, 3]
    assert await pond.count("step", "tries = 3") == 1
    retrying = [e.data for e in await pond.events(run_id) if e.kind == "step.retrying"]
    assert [one["tries"] for one in retrying] == [1, 2]
    assert retrying[1]["delay_s"] >= 1.2


async def test_a_step_that_fails_for_good_elsewhere_raises_in_the_flow(pond: Pond) -> None:
    async def refuse(step: StepContext) -> None:
        raise Permanent("not allowed", code="denied")

    step = pond.step(refuse, queue="sql")

    async def ask(ctx: Context, _: None) -> list[str]:
        try:
            await ctx.step(step)
        except StepFailed as error:
            return [error.step, error.code, error.message]
        return []

    flow = pond.flow(ask)
    async with pond.worker({"default": 5, "sql": 1}):
        run_id = await pond.submit(flow)
        row = await pond.ended(run_id)
    assert row["output"] == ["refuse", "denied", "not allowed"]
    failed = [e.data for e in await pond.events(run_id) if e.kind == "step.failed"]
    assert failed[0]["queue"] == "sql"
    assert failed[0]["error"]["code"] == "denied"


async def test_a_step_over_its_time_elsewhere_is_a_failed_try(pond: Pond) -> None:
    async def slow(step: StepContext) -> None:
        await asyncio.sleep(60)

    step = pond.step(slow, queue="sql", timeout_s=0.1, retry=Retry(max_tries=1))

    async def ask(ctx: Context, _: None) -> str:
        try:
            await ctx.step(step)
        except StepFailed as error:
            return error.code
        return ""

    flow = pond.flow(ask)
    async with pond.worker({"default": 5, "sql": 1}):
        row = await pond.ended(await pond.submit(flow))
    assert row["output"] == "timeout"


async def test_what_cannot_go_elsewhere_is_refused_by_name(pond: Pond) -> None:
    async def look(step: StepContext, handle: Handle) -> None:
        return None

    async def count(step: StepContext, n: int) -> int:
        return n

    with pytest.raises(InvalidInput) as refused:
        pond.step(look, queue="sql")
    assert refused.value.param == "handle"

    async def queued(step: StepContext, queue: str) -> None:
        return None

    with pytest.raises(InvalidInput, match="may have that name"):
        pond.step(queued)
    step = pond.step(count)
    for elsewhere in ({"queue": "sql"}, {"needs": {"gpu": "true"}}):
        with pytest.raises(InvalidInput) as refused:
            pond.step(count, name="once", effect="once", **elsewhere)
        assert refused.value.code == "once_elsewhere"
        assert refused.value.param in elsewhere
    once = pond.step(count, name="once", effect="once")

    async def plain(_: Any) -> int:
        return 1

    async def ask(ctx: Context, kind: str) -> Any:
        if kind == "unregistered":
            return await ctx.step("plain", plain, 1, queue="sql")  # type: ignore[call-overload]
        if kind == "once":
            return await ctx.step(once, 1, queue="sql")
        return await ctx.step(step, "many", queue="sql")

    flow = pond.flow(ask)
    async with pond.worker({"default": 5, "sql": 1}):
        unregistered = await pond.ended(await pond.submit(flow, "unregistered"))
        mistyped = await pond.ended(await pond.submit(flow, "mistyped"))
        irreversible = await pond.ended(await pond.submit(flow, "once"))
    assert irreversible["error"]["code"] == "once_elsewhere"
    assert unregistered["error"]["code"] == "step_not_registered"
    assert mistyped["error"]["code"] == "not_json"
    assert "argument n of step count" in mistyped["error"]["message"]
    assert await pond.count("item") == 0


async def test_cancel_of_a_waiting_run_takes_its_steps_out_of_their_queues(pond: Pond) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def stay(step: StepContext) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    under_way = pond.step(stay, queue="sql")
    queued = pond.step(stay, name="queued", queue="nowhere")

    async def ask(ctx: Context, _: None) -> None:
        await ctx.parallel(ctx.step(under_way), ctx.step(queued))

    flow = pond.flow(ask)
    async with pond.worker({"default": 5, "sql": 1}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.waiting")
        await asyncio.wait_for(begun.wait(), DEADLINE_S)
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == "cancelled"
        assert await pond.count("item", "queue = 'nowhere'") == await pond.count("ready") == 0
        pond.hints.cancelled([run_id])
        await asyncio.wait_for(stopped.wait(), DEADLINE_S)
        await _gone(pond, "item")
        await _gone(pond, "lease")
    kinds = await pond.kinds(run_id)
    assert kinds[-1] == "run.cancelled"
    assert kinds.count("run.cancelled") == 1


async def test_a_run_that_fails_while_a_step_is_elsewhere_stops_it(pond: Pond) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def stay(step: StepContext) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    step = pond.step(stay, queue="sql")

    async def ask(ctx: Context, _: None) -> None:
        async def linger() -> None:
            await begun.wait()
            await asyncio.sleep(60)

        try:
            async with asyncio.timeout(1.5):
                await ctx.parallel(ctx.step(step), ctx.step("linger", linger))
        except TimeoutError as error:
            raise Permanent("enough") from error

    flow = pond.flow(ask)
    async with pond.worker({"default": 5, "sql": 1}):
        row = await pond.ended(await pond.submit(flow))
        await asyncio.wait_for(stopped.wait(), DEADLINE_S)
        await _gone(pond, "item")
    assert row["outcome"] == "failed"


async def test_a_drained_worker_hands_its_step_back_without_a_try(pond: Pond) -> None:
    tries: list[int] = []

    async def stay(step: StepContext) -> int:
        tries.append(step.try_number)
        if len(tries) == 1:
            await asyncio.sleep(60)
        return len(tries)

    step = pond.step(stay, queue="sql")

    async def ask(ctx: Context, _: None) -> int:
        return await ctx.step(step)

    flow = pond.flow(ask)
    async with pond.worker({"default": 5}):
        async with pond.worker({"sql": 1}, flows=[], drain_s=0.1):
            run_id = await pond.submit(flow)
            await pond.until(run_id, "step.started")
        assert await pond.count("lease") == 0
        async with pond.worker({"sql": 1}, flows=[]):
            row = await pond.ended(run_id)
    assert row["output"] == 2
    assert tries == [1, 1]
    kinds = await pond.kinds(run_id)
    assert kinds.count("step.released") == 1
    assert "run.released" not in kinds


async def _claimed_step(pond: Pond) -> Any:
    """Claim a step by hand, whose run waits for it."""

    async def look(step: StepContext) -> int:
        return 1

    step = pond.step(look, queue="sql")

    async def ask(ctx: Context, _: None) -> int:
        return await ctx.step(step)

    flow = pond.flow(ask)
    async with pond.worker({"default": 1}):
        run_id = await pond.submit(flow)
        await pond.until(run_id, "run.waiting")
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
        capabilities=[step.capability],
        estimate_s=lambda _: 1.0,
    )
    [claimed], _ = await claimer.claim({"sql": 1})
    return claimed


def _done(claimed: Any, output: str = "1") -> RemoteWrite:
    return RemoteWrite(
        lease=claimed.lease,
        step_key=claimed.step_key,
        state="done",
        output=output,
        tries=1,
        event_kind="step.succeeded",
        event_data="{}",
    )


async def test_a_stale_lease_of_a_step_writes_nothing(pond: Pond) -> None:
    claimed = await _claimed_step(pond)
    assert claimed.queue == "sql"
    assert claimed.lease.is_of_step
    stale = claimed._replace(lease=claimed.lease._replace(token=uuid.uuid4()))
    async with pond.engine_db.duty("test") as con:
        stored, readied = await settle(con, [_done(stale), _done(claimed)])
    assert stored == {1}
    assert [one.queue for one in readied] == ["default"]
    async with pond.engine_db.duty("test") as con:
        assert await settle(con, [_done(claimed, "2")]) == (set(), [])
    assert await pond.count("step", "output::text = '1'") == 1


async def test_the_steps_of_an_ended_run_leave_nothing_behind(pond: Pond) -> None:
    claimed = await _claimed_step(pond)
    async with pond.db.org(pond.org_id) as con:
        await cancel(con, pond.org_id, claimed.lease.run_id, "user:test")
    assert await pond.count("item", "cancel_requested") == 1
    assert await remote.orders(pond.engine_db, [claimed.lease]) == {}
    async with pond.engine_db.duty("test") as con:
        assert await settle(con, [_done(claimed)]) == (set(), [])
    assert await pond.count("item") == await pond.count("lease") == 0
    assert await pond.count("step", "state = 'waiting'") == 1
    assert (await pond.kinds(claimed.lease.run_id))[-1] == "run.cancelled"


async def test_sending_twice_after_a_lost_answer_queues_one_work_item(pond: Pond) -> None:
    claimed = await _claimed_step(pond)
    assert claimed.lease.item_id == remote.item_id(
        pond.org_id, claimed.lease.run_id, claimed.step_key
    )
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update item set state = 'running', token = $1 where item_id = run_id",
            claimed.lease.token,
        )
    run = claimed.lease._replace(item_id=claimed.lease.run_id)
    sent = remote.Sent(
        step_key=claimed.step_key,
        name="look",
        queue="sql",
        capability="step:look",
        arguments="{}",
    )
    await remote.send(pond.engine_db, run, sent)
    assert await pond.count("item", "kind = 'step'") == 1
    assert (await pond.kinds(run.run_id)).count("step.queued") == 1


async def test_a_step_that_also_kills_the_process_that_has_it_alone_fails_in_its_run(
    pond: Pond,
) -> None:
    claimed = await _claimed_step(pond)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update item set deaths = 2 where kind = 'step'")
        await con.execute("delete from worker")
        lost = await con.fetch(queries("maintenance")["orphaned"], 10, 1.0)
        readied = await remote.rescue(con, lost, deaths={row["token"] for row in lost}, heard_at={})
    assert [one.run_id for one in readied] == [claimed.lease.run_id]
    assert await pond.count("item", "kind = 'step'") == await pond.count("lease") == 0
    async with pond.worker({"default": 1}):
        row = await pond.ended(claimed.lease.run_id)
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "poison"


async def test_rescue_waits_for_no_run_that_somebody_holds(pond: Pond) -> None:
    claimed = await _claimed_step(pond)
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from worker")
    async with pond.db.org(pond.org_id) as held:
        await held.execute("select from item where item_id = $1 for update", claimed.lease.run_id)
        async with pond.engine_db.duty("test") as con:
            lost = await con.fetch(queries("maintenance")["orphaned"], 10, 1.0)
            assert await remote.rescue(con, lost, deaths=frozenset(), heard_at={}) == []
    assert await pond.count("lease") == 1
    async with pond.engine_db.duty("test") as con:
        lost = await con.fetch(queries("maintenance")["orphaned"], 10, 1.0)
        assert [
            one.queue for one in await remote.rescue(con, lost, deaths=frozenset(), heard_at={})
        ] == ["sql"]
    assert await pond.count("lease") == 0
    assert (await pond.kinds(claimed.lease.run_id))[-1] == "step.rescued"
