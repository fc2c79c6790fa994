"""What flow code may do to asyncio and to values: stray cancels, groups, time limits, odd results."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.engine.context import Context, StepContext
from millpond.engine.questions import resolve
from millpond.engine.registry import step
from millpond.engine.submit import submit
from millpond.errors import InvalidInput
from millpond.retry import Retry
from millpond.types import Principal

QUICK = Retry(max_tries=2, unknown_tries=2, base_s=0.01, cap_s=0.02)
HUMAN = Principal(org_id=0, subject="user:kim", roles=frozenset({"support"}))


async def _cancelled_inside() -> None:
    task = asyncio.create_task(asyncio.sleep(10))
    task.cancel()
    await task


@pytest.mark.parametrize("in_branch", [False, True])
async def test_a_cancellation_from_inside_is_a_failed_step_and_no_cancel(
    pond: Pond, in_branch: bool
) -> None:
    async def odd(ctx: Context, _: None) -> None:
        one = ctx.step("odd", _cancelled_inside, retry=QUICK)
        if in_branch:
            await ctx.parallel(one)
        else:
            await one

    pond.flow(odd)
    async with pond.worker():
        row = await pond.ended(await pond.submit("odd"))
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "stray_exit"
    assert await pond.count("lease") == 0


async def test_an_exit_from_a_step_fails_the_step_and_not_the_worker(pond: Pond) -> None:
    async def leave(ctx: Context, _: None) -> None:
        async def out() -> None:
            raise SystemExit(3)

        await ctx.step("out", out, retry=QUICK)

    pond.flow(leave)
    async with pond.worker():
        row = await pond.ended(await pond.submit("leave"))
    assert row["error"]["code"] == "stray_exit"


async def test_a_task_group_around_a_wait_parks_like_any_other(pond: Pond) -> None:
    async def grouped(ctx: Context, _: None) -> str:
        async with asyncio.TaskGroup():
            await ctx.sleep(1.1)
        return "awake"

    pond.flow(grouped)
    async with pond.worker():
        row = await pond.ended(await pond.submit("grouped"))
    assert row["output"] == "awake"


async def test_a_time_limit_of_the_flow_ends_branches_and_the_flow_goes_on(pond: Pond) -> None:
    async def limited(ctx: Context, _: None) -> str:
        async def slow() -> None:
            await asyncio.Event().wait()

        try:
            async with asyncio.timeout(0.2):
                await ctx.parallel(ctx.step("a", slow), ctx.step("b", slow))
        except TimeoutError:
            return await ctx.step("after", _text)
        return "not reached"

    async def _text() -> str:
        return "went on"

    pond.flow(limited)
    async with pond.worker():
        row = await pond.ended(await pond.submit("limited"))
    assert row["output"] == "went on"


async def test_branches_clean_up_when_their_run_is_over_its_time(pond: Pond) -> None:
    cleaned = []

    async def cleans(ctx: Context, _: None) -> None:
        async def slow() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.append(True)

        await ctx.parallel(ctx.sleep(3600), ctx.step("slow", slow))

    pond.flow(cleans, timeout_s=0.4)
    async with pond.worker():
        row = await pond.ended(await pond.submit("cleans"))
    assert row["error"]["code"] == "timeout"
    assert cleaned == [True]
    assert await pond.count("timer") == 0


async def test_an_approval_holds_for_what_the_first_run_and_the_replay_both_see(pond: Pond) -> None:
    @step("look", registry=pond.registry)
    async def look(ctx: StepContext) -> dict[str, Any]:
        return {"at": datetime(2024, 1, 1, tzinfo=UTC), "pair": (1, 2), "set": {"a", "b", "c"}}

    async def asks(ctx: Context, _: None) -> Any:
        seen = await ctx.step(look)
        form = {"type": "boolean"}
        decision = await ctx.ask_human("ok", role="support", form=form, proposal=seen)
        return [decision.answer, type(seen["at"]).__name__]

    pond.flow(asks)
    async with pond.worker():
        run_id = await pond.submit("asks")
        event = await pond.until(run_id, "input.requested")
        async with pond.db.org(pond.org_id) as con:
            request_id = uuid.UUID(event.data["request_id"])
            readied = await resolve(con, pond.org_id, request_id, HUMAN, answer=True)
        pond.hints.wake([readied.queue])
        row = await pond.ended(run_id)
    assert row["output"] == [True, "str"]


async def test_a_result_that_would_not_read_back_fails_its_step_at_once(pond: Pond) -> None:
    @step("wrong", registry=pond.registry)
    async def wrong(ctx: StepContext) -> dict[str, float]:
        return {"value": float("nan")}

    async def reads(ctx: Context, _: None) -> Any:
        return await ctx.step(wrong)

    pond.flow(reads)
    async with pond.worker():
        row = await pond.ended(await pond.submit("reads"))
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "not_json"


async def test_a_form_that_is_no_schema_is_refused_before_anybody_is_asked(pond: Pond) -> None:
    async def asks(ctx: Context, _: None) -> None:
        await ctx.ask_human("ok", role="support", form={"type": "wat"})

    pond.flow(asks)
    async with pond.worker():
        row = await pond.ended(await pond.submit("asks"))
    assert row["error"]["code"] == "bad_form"
    assert await pond.count("input_request") == 0


def test_a_flow_takes_context_and_input() -> None:
    from millpond.engine.registry import Registry, flow

    async def lonely(ctx: Context) -> None: ...

    with pytest.raises(InvalidInput, match="two parameters"):
        flow("lonely", registry=Registry())(lonely)


async def test_a_forged_hint_cancels_nothing(pond: Pond) -> None:
    gate = asyncio.Event()

    async def holds(ctx: Context, _: None) -> str:
        async def wait() -> str:
            await gate.wait()
            return "done"

        return await ctx.step("wait", wait)

    pond.flow(holds)
    async with pond.worker():
        run_id = await pond.submit("holds")
        await pond.until(run_id, "step.started")
        async with pond.db.globals() as con:
            await con.execute("select pg_notify('millpond_cancelled', $1)", str(run_id))
        other = await pond.submit("holds")
        await pond.until(other, "step.started")
        gate.set()
        row = await pond.ended(run_id)
    assert row["outcome"] == "succeeded"


async def test_histories_of_two_orgs_never_mix_even_under_one_run_id(
    pond: Pond, other_org: int
) -> None:
    async def keeps(ctx: Context, who: str) -> list[str]:
        async def me() -> str:
            return who

        first = await ctx.step("me", me)
        await ctx.sleep(1.1)
        return [first, await ctx.step("me", me)]

    flow = pond.flow(keeps)
    run_id = uuid.uuid4()
    for org_id, who in ((pond.org_id, "A"), (other_org, "B")):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent(flow, who, org_id=org_id, run_id=run_id)])
    async with pond.worker():
        mine = await pond.ended(run_id)
        async with asyncio.timeout(20):
            while await pond.count("item"):
                await asyncio.sleep(0.05)
    async with pond.db.org(other_org) as con:
        theirs = await con.fetchval("select output::text from run where run_id = $1", run_id)
    assert mine["output"] == ["A", "A"]
    assert theirs == '["B","B"]'
