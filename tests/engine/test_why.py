"""Why: every state of a run has its exact reasons."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond

from millpond.db.queries import queries
from millpond.engine.context import Context
from millpond.engine.pauses import Scope, pause
from millpond.engine.submit import submit
from millpond.engine.why import MAX_AHEAD, Reason, Why, explain
from millpond.errors import NotFound, Transient
from millpond.retry import Retry
from millpond.types import Parent, RunState


class Answer(BaseModel):
    yes: bool


async def idle(ctx: Context, _: Any) -> None:
    return None


async def nap(ctx: Context, _: Any) -> None:
    await ctx.sleep(3600)


async def why(pond: Pond, run_id: uuid.UUID) -> Why:
    async with pond.db.org(pond.org_id) as con:
        return await explain(con, pond.org_id, run_id)


async def only(pond: Pond, run_id: uuid.UUID) -> Reason:
    (reason,) = (await why(pond, run_id)).reasons
    return reason


async def register(
    pond: Pond,
    queues: str = '{"default": 4}',
    able: str = "idle@1",
    in_use: str = "{}",
    told: str = "{}",
) -> uuid.UUID:
    """Stand for a live worker that claims nothing."""
    worker_id = uuid.uuid4()
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            *(worker_id, "mill", 7, queues, [able], 600.0, "1", "{}"),
        )
        await con.execute(queries("maintenance")["watch"], worker_id, in_use, told)
    return worker_id


async def waiting_run(pond: Pond) -> uuid.UUID:
    """Bring a run to wait, so that a test can write what else it waits for."""
    pond.flow(nap)
    async with pond.worker():
        run_id = await pond.submit("nap")
        await pond.until(run_id, "run.waiting")
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from step")
        await con.execute("delete from timer")
    return run_id


async def add_step(pond: Pond, run_id: uuid.UUID, **values: Any) -> None:
    values = {"org_id": pond.org_id, "run_id": run_id, "state": "waiting", "attempt": 1, **values}
    marks = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            f"insert into step ({', '.join(values)}, started_at) "
            f"values ({marks}, clock_timestamp())",
            *values.values(),
        )


async def test_a_run_of_another_org_does_not_exist(pond: Pond, other_org: int) -> None:
    run_id = await pond.submit("idle", org_id=other_org)
    with pytest.raises(NotFound):
        await why(pond, run_id)


async def test_a_delayed_run_is_scheduled(pond: Pond) -> None:
    run_id = await pond.submit("idle", delay_s=3600, deadline_s=7200)
    found = await why(pond, run_id)
    assert found.state == RunState.SCHEDULED
    assert found.deadline_at is not None
    (reason,) = found.reasons
    assert reason.kind == "scheduled"
    assert (found.deadline_at - reason.facts["until"]).total_seconds() == 3600
    assert "starts at" in found.text


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (None, "No worker is live."),
        ({"queues": '{"llm": 4}'}, "No live worker serves queue default."),
        ({"able": "idle@2"}, "No live worker of queue default has idle@1."),
    ],
)
async def test_a_queued_run_that_no_worker_can_do(
    pond: Pond, worker: dict[str, str] | None, text: str
) -> None:
    if worker is not None:
        await register(pond, **worker)
    reason = await only(pond, await pond.submit("idle"))
    assert reason.kind == "no_worker"
    assert reason.text == text
    assert (reason.facts["queue"], reason.facts["capability"]) == ("default", "idle@1")
    assert len(reason.facts["workers"]) == (worker is not None)


async def test_a_draining_or_silent_worker_does_not_count(pond: Pond) -> None:
    draining, silent = await register(pond), await register(pond)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update worker set draining = true where worker_id = $1", draining)
        await con.execute(
            "update worker set expires_at = clock_timestamp() where worker_id = $1", silent
        )
    reason = await only(pond, await pond.submit("idle"))
    assert reason.kind == "no_worker"
    (shown,) = reason.facts["workers"]
    assert (shown["id"], shown["is_draining"]) == (draining, True)


async def test_a_run_that_killed_its_workers_needs_one_that_executes_alone(pond: Pond) -> None:
    await register(pond)
    run_id = await pond.submit("idle")
    async with pond.engine_db.duty("test") as con:
        await con.execute("update item set lane_id = lane_id | 2, deaths = 2")
    reason = await only(pond, run_id)
    assert (reason.kind, reason.facts["capability"]) == ("no_worker", "idle@1!")


async def test_a_queued_run_tells_its_place_and_whether_slots_are_busy(pond: Pond) -> None:
    await register(pond, in_use='{"default": 3}')
    ids = [await pond.submit("idle") for _ in range(3)]
    reason = await only(pond, ids[2])
    assert reason.kind == "in_line"
    assert reason.facts == {
        "queue": "default",
        "urgency": "standard",
        "ahead": 2,
        "is_exact": True,
        "ahead_of_org": 2,
        "ahead_of_all": 2,
        "is_order_exact": True,
        "slots": 4,
        "in_use": 3,
    }
    assert "2 before it" in reason.text
    assert "3 of 4 slots" in reason.text


async def test_a_place_is_exact_up_to_a_thousand(pond: Pond) -> None:
    await register(pond)
    intents = [pond.intent("idle") for _ in range(MAX_AHEAD + 2)]
    async with pond.db.org(pond.org_id) as con:
        await submit(con, intents)
    for nth, is_exact in ((MAX_AHEAD, True), (MAX_AHEAD + 1, False)):
        facts = (await only(pond, intents[nth].run_id)).facts
        assert (facts["ahead"], facts["is_exact"]) == (MAX_AHEAD, is_exact)


async def test_every_pause_that_holds_a_queued_run_is_named(pond: Pond) -> None:
    await register(pond)
    run_id = await pond.submit("idle")
    other = Scope(flow="other")
    scopes = [Scope(), Scope(flow="idle"), Scope(queue="default")]
    everyone = Scope(queue="default", is_for_everyone=True)
    async with pond.db.org(pond.org_id) as con:
        for scope in (*scopes, other, everyone):
            await pause(con, pond.org_id, scope, "user:ann", "repairs")
    reasons = (await why(pond, run_id)).reasons
    assert {reason.kind for reason in reasons} == {"paused"}
    assert [reason.facts["scope"] for reason in reasons] == ["org", "flow", "queue", "everyone"]
    assert [reason.facts["paused_by"] for reason in reasons] == [*["user:ann"] * 3, "operator"]
    assert "Queue default is paused by user:ann since" in reasons[2].text
    assert "(repairs)" in reasons[2].text


async def test_a_paused_run_without_a_worker_has_both_reasons(pond: Pond) -> None:
    run_id = await pond.submit("idle")
    async with pond.db.org(pond.org_id) as con:
        await pause(con, pond.org_id, Scope(), "user:ann", "")
    assert [one.kind for one in (await why(pond, run_id)).reasons] == ["paused", "no_worker"]


async def test_a_running_run_tells_where_and_what_is_under_way(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def work(ctx: Context, _: None) -> None:
        async def quick() -> None:
            return None

        async def slow() -> None:
            await may_end.wait()

        await ctx.step("quick", quick)
        await ctx.step("slow", slow)

    pond.flow(work)
    async with pond.worker() as worker:
        run_id = await pond.submit("work", deadline_s=3600)
        await pond.until(run_id, "step.started")
        found = await why(pond, run_id)
        (reason,) = found.reasons
        assert found.state == RunState.RUNNING
        assert reason.kind == "running"
        assert reason.facts["worker"]["id"] == worker.worker_id
        assert [step["name"] for step in reason.facts["steps"]] == ["slow"]
        assert (reason.facts["attempt"], reason.facts["stopping"]) == (1, None)
        may_end.set()
        await pond.ended(run_id)
        ended = await only(pond, run_id)
    assert ended.kind == "finished"
    assert "has succeeded" in ended.text


async def test_a_run_that_shall_stop_tells_for_what(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def stubborn(ctx: Context, _: None) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    pond.flow(stubborn)
    async with pond.worker():
        run_id = await pond.submit("stubborn", deadline_s=3600)
        await pond.until(run_id, "run.started")
        async with pond.engine_db.duty("test") as con:
            await con.execute("update timer set due_at = clock_timestamp()")
        await pond.until(run_id, "run.overdue")
        assert (await only(pond, run_id)).facts["stopping"] == "deadline"
        may_end.set()
        await pond.ended(run_id)
    reason = await only(pond, run_id)
    assert reason.kind == "finished"
    assert "deadline_exceeded" in reason.text


async def test_waits_for_time_and_people_are_told(pond: Pond) -> None:
    slow = Retry(max_tries=5, base_s=600, cap_s=600, max_elapsed_s=6000)

    async def mixed(ctx: Context, _: None) -> None:
        async def flaky() -> None:
            raise Transient("busy", retry_after_s=600)

        await ctx.parallel(
            ctx.sleep(3600, name="rest"),
            ctx.step("flaky", flaky, retry=slow),
            ctx.ask_human("ok", role="support", form=Answer, title="Ship it?", expires_in_s=900),
        )

    pond.flow(mixed)
    async with pond.worker():
        run_id = await pond.submit("mixed")
        await pond.until(run_id, "run.waiting")
    found = await why(pond, run_id)
    assert found.state == RunState.WAITING
    by_kind = {reason.kind: reason for reason in found.reasons}
    assert set(by_kind) == {"sleep", "backoff", "input"}
    assert by_kind["sleep"].facts["name"] == "rest"
    assert by_kind["backoff"].facts["error"]["message"] == "busy"
    assert by_kind["backoff"].facts["until"] is not None
    asked = by_kind["input"].facts
    assert (asked["role"], asked["title"]) == ("support", "Ship it?")
    assert asked["expires_at"] is not None
    assert await pond.count("input_request", f"request_id = '{asked['request_id']}'") == 1


async def test_a_run_awaiting_a_human_names_the_question(pond: Pond) -> None:
    async def ask(ctx: Context, _: None) -> None:
        await ctx.ask_human("ok", role="support", form=Answer, title="Ship it?")

    pond.flow(ask)
    async with pond.worker():
        run_id = await pond.submit("ask")
        await pond.until(run_id, "run.awaiting_input")
    found = await why(pond, run_id)
    assert found.state == RunState.AWAITING_INPUT
    assert [reason.kind for reason in found.reasons] == ["input"]
    assert found.text == "Somebody with the role support has to decide 'Ship it?'."


async def test_a_flow_that_is_tried_again_tells_its_last_error(pond: Pond) -> None:
    async def stumble(ctx: Context, _: None) -> None:
        raise Transient("not now", retry_after_s=600)

    pond.flow(stumble, retry=Retry(max_elapsed_s=6000))
    async with pond.worker():
        run_id = await pond.submit("stumble")
        await pond.until(run_id, "run.retrying")
    reason = await only(pond, run_id)
    assert reason.kind == "backoff"
    assert reason.facts["step"] is None
    assert reason.facts["error"]["message"] == "not now"
    assert reason.facts["tries"] == 1


async def test_a_wait_for_a_signal_names_it_and_its_limit(pond: Pond) -> None:
    run_id = await waiting_run(pond)
    await add_step(pond, run_id, step_key="paid:0", name="paid", kind="signal")
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            queries("waits")["set_timer"], pond.org_id, run_id, "paid:0", "signal", 60.0
        )
    reason = await only(pond, run_id)
    assert (reason.kind, reason.facts["name"]) == ("signal", "paid")
    assert reason.facts["until"] is not None


async def test_a_wait_for_a_child_names_it_and_its_state(pond: Pond) -> None:
    run_id = await waiting_run(pond)
    parent = Parent(run_id=run_id, step_key="child:0", close_policy="cancel")
    child_id = await pond.submit("idle", parent=parent)
    await add_step(pond, run_id, step_key="join:0", name="join", kind="join", ref=child_id)
    reason = await only(pond, run_id)
    assert reason.kind == "child"
    assert reason.facts["run_id"] == child_id
    assert (reason.facts["flow"], reason.facts["state"]) == ("idle", "queued")


async def test_a_step_in_another_queue_tells_why_its_work_item_waits(pond: Pond) -> None:
    run_id, item_id = await waiting_run(pond), uuid.uuid4()
    await add_step(pond, run_id, step_key="query:0", name="query", kind="step", ref=item_id)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into item (org_id, item_id, run_id, state, kind, lane_id, rank, step_key, queue,"
            " capability) values ($1, $2, $3, 'queued', 'step', 4, 1, 'query:0', 'sql', 'query')",
            *(pond.org_id, item_id, run_id),
        )
    reason = await only(pond, run_id)
    assert (reason.kind, reason.facts["queue"]) == ("other_queue", "sql")
    assert [inner.kind for inner in reason.inner] == ["no_worker"]
    await register(pond, queues='{"sql": 2}', able="query")
    assert [one.kind for one in (await only(pond, run_id)).inner] == ["in_line"]
    async with pond.db.org(pond.org_id) as con:
        await pause(con, pond.org_id, Scope(flow="query"), "user:ann", "")
        await pause(con, pond.org_id, Scope(queue="sql"), "user:ann", "")
    held = (await only(pond, run_id)).inner
    assert [one.facts["scope"] for one in held] == ["queue"]
    assert "Queue sql is paused" in (await why(pond, run_id)).text


async def test_a_blocked_run_shows_what_blocks_it(pond: Pond) -> None:
    run_id = await waiting_run(pond)
    async with pond.engine_db.duty("test") as con:
        await con.execute('update item set blocked = \'{"message": "the code differs"}\'')
    reason = await only(pond, run_id)
    assert reason.kind == "blocked"
    assert reason.facts["blocked"] == {"message": "the code differs"}
    assert reason.text.endswith("the code differs.")


async def test_explaining_waits_for_no_lock(pond: Pond) -> None:
    run_id = await pond.submit("idle")
    async with pond.engine_db.duty("claim") as con:
        await con.execute("select pg_advisory_xact_lock(7741001)")
        await con.execute("select from item where item_id = $1 for update", run_id)
        async with asyncio.timeout(5):
            assert (await only(pond, run_id)).kind == "no_worker"


async def test_an_unknown_outcome_asks_a_person_how_the_step_ended(pond: Pond) -> None:
    run_id, request_id = await waiting_run(pond), uuid.uuid4()
    await add_step(
        pond, run_id, step_key="pay:0", name="pay", kind="step", state="unknown", ref=request_id
    )
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into input_request (org_id, request_id, run_id, step_key, role, title, form,"
            " proposal, digest, kind) values ($1, $2, $3, 'pay:0', 'admin', 'x', '{}', '{}', '',"
            " 'outcome')",
            *(pond.org_id, request_id, run_id),
        )
    reason = await only(pond, run_id)
    assert (reason.kind, reason.facts["request_id"]) == ("outcome", request_id)
    assert reason.text == "Somebody with the role admin has to say how pay ended."
