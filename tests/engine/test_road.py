"""The road of a run: submitted, claimed, stepped, waiting, finished."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond

from millpond.engine.context import Context, Decision, InputExpired, StepFailed
from millpond.engine.operations import cancel
from millpond.engine.questions import resolve
from millpond.errors import Conflict, Forbidden, InvalidInput, Permanent, Transient
from millpond.retry import Retry
from millpond.types import Principal, RunState


class Greeting(BaseModel):
    name: str


async def test_a_run_goes_from_submit_to_its_output(pond: Pond) -> None:
    async def greet(ctx: Context, greeting: Greeting) -> str:
        async def shout(name: str) -> str:
            return name.upper()

        return "hello " + await ctx.step("shout", shout, greeting.name)

    flow = pond.flow(greet)
    run_id = await pond.submit(flow, {"name": "mill"})
    assert await pond.kinds(run_id) == ["run.queued"]
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["outcome"] == "succeeded"
    assert row["output"] == "hello MILL"
    assert await pond.kinds(run_id) == [
        "run.queued",
        "run.started",
        "step.succeeded",
        "run.succeeded",
    ]
    assert [event.event_no for event in await pond.events(run_id)] == [1, 2, 3, 4]
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0


async def test_many_runs_of_many_orgs_all_end_once(pond: Pond, other_org: int) -> None:
    seen: list[int] = []

    async def count(ctx: Context, number: int) -> int:
        seen.append(number)
        return number

    flow = pond.flow(count)
    async with pond.worker({"default": 7}):
        ids = await asyncio.gather(
            *(pond.submit(flow, n, org_id=(pond.org_id, other_org)[n % 2]) for n in range(60))
        )
        for run_id in ids[::2]:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        async with asyncio.timeout(10):
            while await pond.count("run", "outcome is null"):
                await asyncio.sleep(0.02)
    assert sorted(seen) == list(range(60))


async def test_recorded_steps_are_not_run_again_after_a_wait(pond: Pond) -> None:
    calls: list[str] = []

    async def waits(ctx: Context, _: None) -> list[str]:
        async def note(what: str) -> str:
            calls.append(what)
            return what

        first = await ctx.step("note", note, "before")
        await ctx.emit("half", {"done": 1})
        await ctx.sleep(1.2)
        second = await ctx.step("note", note, "after")
        return [first, second]

    pond.flow(waits)
    async with pond.worker():
        run_id = await pond.submit("waits")
        await pond.until(run_id, "run.waiting")
        assert await pond.count("lease") == 0
        row = await pond.ended(run_id)
    assert row["output"] == ["before", "after"]
    assert calls == ["before", "after"]
    assert (await pond.kinds(run_id)).count("progress") == 1
    assert row["attempts"] == 2


async def test_branches_keep_their_records_whatever_ends_first(pond: Pond) -> None:
    async def fan(ctx: Context, _: None) -> list[Any]:
        async def slow(value: int, delay_s: float) -> int:
            await asyncio.sleep(delay_s)
            return value

        async def strand(value: int, delay_s: float) -> int:
            one = await ctx.step("work", slow, value, delay_s)
            await ctx.sleep(1.1)
            return one + await ctx.step("work", slow, 100 * value, delay_s / 3)

        return list(await ctx.parallel(strand(1, 0.09), strand(2, 0.01), strand(3, 0.05)))

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan")
        row = await pond.ended(run_id)
    assert row["output"] == [101, 202, 303]


async def test_a_transient_error_is_tried_again_and_a_permanent_one_is_not(pond: Pond) -> None:
    calls = {"flaky": 0, "wrong": 0}
    quick = Retry(max_tries=3, base_s=0.01, cap_s=0.02)

    async def try_both(ctx: Context, _: None) -> str:
        async def flaky() -> str:
            calls["flaky"] += 1
            if calls["flaky"] < 3:
                raise Transient("not yet")
            return "at last"

        async def wrong() -> None:
            calls["wrong"] += 1
            raise Permanent("never")

        text = await ctx.step("flaky", flaky, retry=quick)
        try:
            await ctx.step("wrong", wrong, retry=quick)
        except StepFailed as failed:
            return f"{text}, {failed.message}"
        return "not reached"

    pond.flow(try_both)
    async with pond.worker():
        run_id = await pond.submit("try_both")
        row = await pond.ended(run_id)
    assert row["output"] == "at last, never"
    assert calls == {"flaky": 3, "wrong": 1}
    kinds = await pond.kinds(run_id)
    assert kinds.count("step.retrying") == 2
    assert kinds.count("step.failed") == 1


async def test_a_long_backoff_gives_the_slot_back(pond: Pond) -> None:
    calls = 0

    async def late(ctx: Context, _: None) -> int:
        async def throttled() -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise Transient("slow down", retry_after_s=1.3)
            return calls

        return await ctx.step("throttled", throttled, retry=Retry(max_tries=2, base_s=0))

    pond.flow(late)
    async with pond.worker():
        run_id = await pond.submit("late")
        await pond.until(run_id, "run.waiting")
        assert await pond.count("lease") == 0
        row = await pond.ended(run_id)
    assert row["output"] == 2


async def test_a_failed_run_tells_class_step_and_message(pond: Pond) -> None:
    async def breaks(ctx: Context, _: None) -> None:
        async def wrong() -> None:
            raise InvalidInput("the field is empty", param="field")

        await ctx.step("wrong", wrong)

    pond.flow(breaks)
    async with pond.worker():
        row = await pond.ended(await pond.submit("breaks"))
    assert row["outcome"] == "failed"
    assert row["error"]["cause"] == "InvalidInput"
    assert row["error"]["step"] == "wrong"
    assert "the field is empty" in row["error"]["message"]


class Verdict(BaseModel):
    approve: bool
    note: str = ""


SUPPORT = Principal(org_id=0, subject="user:kim", roles=frozenset({"support"}))


async def _ask(ctx: Context, _: None) -> dict[str, Any]:
    decision: Decision[Verdict] = await ctx.ask_human(
        "approve", role="support", form=Verdict, proposal={"reply": "yes"}, title="Send it?"
    )
    return {"approve": decision.answer.approve, "by": decision.resolved_by}


async def test_a_human_answers_once_in_the_right_role_and_form(pond: Pond) -> None:
    pond.flow(_ask, name="ask")
    async with pond.worker():
        run_id = await pond.submit("ask")
        event = await pond.until(run_id, "run.awaiting_input")
        assert await pond.count("lease") == 0
        assert await pond.count("item", "state = 'awaiting_input'") == 1
        async with pond.db.org(pond.org_id) as con:
            request_id = await con.fetchval("select request_id from input_request")
        assert event.data["steps"] == ["approve:0"]

        async def answer(who: Principal, text: Any, digest: bytes | None = None) -> None:
            async with pond.db.org(pond.org_id) as con:
                readied = await resolve(con, pond.org_id, request_id, who, text, digest)
            pond.hints.wake([readied.queue])

        nobody = Principal(org_id=0, subject="user:eve", roles=frozenset({"viewer"}))
        with pytest.raises(Forbidden):
            await answer(nobody, {"approve": True})
        with pytest.raises(InvalidInput, match="approve"):
            await answer(SUPPORT, {"approve": "perhaps"})
        with pytest.raises(Conflict):
            await answer(SUPPORT, {"approve": True}, b"another proposal")
        results = await asyncio.gather(
            *(answer(SUPPORT, {"approve": True}) for _ in range(5)), return_exceptions=True
        )
        assert sum(result is None for result in results) == 1
        assert all(result is None or isinstance(result, Conflict) for result in results)
        row = await pond.ended(run_id)
    assert row["output"] == {"approve": True, "by": "user:kim"}
    assert (await pond.kinds(run_id)).count("input.resolved") == 1


async def test_an_expired_question_takes_its_default_or_fails(pond: Pond) -> None:
    async def impatient(ctx: Context, has_default: bool) -> str:
        try:
            decision = await ctx.ask_human(
                "approve",
                role="support",
                form=Verdict,
                expires_in_s=0.3,
                default=Verdict(approve=False) if has_default else None,
            )
        except InputExpired:
            return "expired"
        return f"{decision.answer.approve} {decision.is_expired}"

    pond.flow(impatient)
    async with pond.worker():
        ids = [await pond.submit("impatient", flag) for flag in (True, False)]
        outputs = [(await pond.ended(run_id))["output"] for run_id in ids]
    assert outputs == ["False True", "expired"]


async def test_cancel_ends_a_run_wherever_it_stands(pond: Pond) -> None:
    started = asyncio.Event()

    async def stuck(ctx: Context, kind: str) -> None:
        async def forever() -> None:
            started.set()
            await asyncio.Event().wait()

        if kind == "step":
            await ctx.step("forever", forever)
        await ctx.sleep(1000)

    pond.flow(stuck)

    async def stop(run_id: Any) -> RunState:
        async with pond.db.org(pond.org_id) as con:
            state = await cancel(con, pond.org_id, run_id, "user:test")
        pond.hints.cancelled([run_id])
        pond.hints.changed([run_id])
        return state

    queued = await pond.submit("stuck", "sleep")
    delayed = await pond.submit("stuck", "sleep", delay_s=500)
    assert await stop(queued) == RunState.CANCELLED
    assert await stop(delayed) == RunState.CANCELLED
    async with pond.worker():
        sleeping = await pond.submit("stuck", "sleep")
        await pond.until(sleeping, "run.waiting")
        assert await stop(sleeping) == RunState.CANCELLED
        running = await pond.submit("stuck", "step")
        await asyncio.wait_for(started.wait(), 10)
        assert await stop(running) == RunState.RUNNING
        for run_id in (queued, delayed, sleeping, running):
            assert (await pond.ended(run_id))["outcome"] == "cancelled"
        assert await stop(running) == RunState.CANCELLED
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0


async def test_a_delayed_run_starts_when_it_is_due(pond: Pond) -> None:
    async def noop(ctx: Context, _: None) -> None:
        return None

    pond.flow(noop)
    async with pond.worker():
        run_id = await pond.submit("noop", delay_s=0.4)
        row = await pond.ended(run_id)
    assert await pond.kinds(run_id) == [
        "run.scheduled",
        "run.queued",
        "run.started",
        "run.succeeded",
    ]
    assert (row["started_at"] - row["created_at"]).total_seconds() >= 0.4


async def test_higher_priority_goes_first(pond: Pond) -> None:
    order: list[str] = []

    async def note(ctx: Context, name: str) -> None:
        order.append(name)

    pond.flow(note)
    ids = [
        await pond.submit("note", "low", priority=-5),
        await pond.submit("note", "normal"),
        await pond.submit("note", "high", priority=5),
    ]
    async with pond.worker({"default": 1}):
        for run_id in ids:
            await pond.ended(run_id)
    assert order == ["high", "normal", "low"]


async def test_ctx_is_refused_in_foreign_tasks_and_inside_steps(pond: Pond) -> None:
    async def misuse(ctx: Context, _: None) -> list[str]:
        async def nested() -> str:
            try:
                await ctx.emit("no")
            except Permanent as error:
                return error.code
            return "allowed"

        codes = [await ctx.step("nested", nested)]
        try:
            await asyncio.create_task(ctx.emit("no"))
        except Permanent as error:
            codes.append(error.code)
        return codes

    pond.flow(misuse)
    async with pond.worker():
        row = await pond.ended(await pond.submit("misuse"))
    assert row["output"] == ["nested_step", "foreign_task"]


async def test_a_flow_body_is_tried_again_only_for_errors_outside_steps(pond: Pond) -> None:
    bodies = 0

    async def shaky(ctx: Context, _: None) -> int:
        nonlocal bodies
        bodies += 1
        if bodies < 3:
            raise Transient("the body stumbled")
        return bodies

    pond.flow(shaky, retry=Retry(max_tries=5, base_s=0.02, cap_s=0.05))
    async with pond.worker():
        run_id = await pond.submit("shaky")
        row = await pond.ended(run_id)
    assert row["output"] == 3
    assert (await pond.kinds(run_id)).count("run.retrying") == 2


async def test_a_flow_body_is_not_tried_again_for_longer_than_its_policy_says(pond: Pond) -> None:
    bodies = 0

    async def hopeless(ctx: Context, _: None) -> None:
        nonlocal bodies
        bodies += 1
        raise Transient("never")

    pond.flow(hopeless, retry=Retry(max_tries=200, base_s=0.02, cap_s=0.02, max_elapsed_s=0.5))
    async with pond.worker():
        row = await pond.ended(await pond.submit("hopeless"))
    assert row["outcome"] == "failed"
    assert 2 <= bodies < 100


async def test_the_time_that_a_run_waited_is_no_time_of_trying_again(pond: Pond) -> None:
    bodies = 0

    async def patient(ctx: Context, _: None) -> int:
        nonlocal bodies
        await ctx.sleep(1.2)
        bodies += 1
        if bodies == 1:
            raise Transient("once")
        return bodies

    pond.flow(patient, retry=Retry(base_s=0.01, cap_s=0.02, max_elapsed_s=1.0))
    async with pond.worker():
        row = await pond.ended(await pond.submit("patient"))
    assert row["output"] == 2


async def test_a_run_over_its_time_fails(pond: Pond) -> None:
    async def slow(ctx: Context, _: None) -> None:
        await ctx.step("forever", asyncio.Event().wait)

    pond.flow(slow, timeout_s=0.2)
    async with pond.worker():
        row = await pond.ended(await pond.submit("slow"))
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "timeout"


async def test_drain_hands_unfinished_runs_back_without_a_death(pond: Pond) -> None:
    release = asyncio.Event()
    tries = 0

    async def long(ctx: Context, _: None) -> int:
        async def hold() -> int:
            nonlocal tries
            tries += 1
            await release.wait()
            return tries

        return await ctx.step("hold", hold)

    pond.flow(long)
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("long")
        await pond.until(run_id, "step.started")
    assert "run.released" in await pond.kinds(run_id)
    assert await pond.count("item", "state = 'queued' and deaths = 0") == 1
    release.set()
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == 2
