"""Effects that must not be repeated: markers, unknown outcomes, the question to a human."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_faults import worker_process

from millpond.engine.attempt import Attempt
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.operations import cancel
from millpond.engine.questions import resolve
from millpond.engine.registry import Step, step
from millpond.errors import Conflict, Forbidden, InvalidInput, NotDone
from millpond.retry import Retry
from millpond.types import Principal, RunState

QUICK = Retry(max_tries=3, base_s=0.01, cap_s=0.02)
OPERATOR = Principal(org_id=0, subject="user:kim", roles=frozenset({"operator"}))


class Booking(BaseModel):
    number: int


class Till:
    """What is behind a step: counts calls, and does to each what the test has in mind."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0
        self.entered = asyncio.Event()

    def step(self, **options: Any) -> Step[Any, Booking]:
        """Return a `once` step over this till."""

        async def book(step_ctx: StepContext) -> Booking:
            self.calls += 1
            self.entered.set()
            outcome = self.outcomes.pop(0) if self.outcomes else Booking(number=self.calls)
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome == "hang":
                await asyncio.Event().wait()
            return outcome  # type: ignore[no-any-return]

        options = {"effect": "once", "retry": QUICK, **options}
        return step("book", **options)(book)


def _register(pond: Pond, till: Till, **options: Any) -> None:
    booked = till.step(registry=pond.registry, **options)

    async def trip(ctx: Context, _: None) -> str:
        try:
            booking = await ctx.step(booked)
        except StepFailed as failed:
            return f"failed: {failed.code}"
        return f"booked {booking.number}"

    pond.flow(trip)


async def _request(pond: Pond, run_id: uuid.UUID, nth: int = 1) -> Any:
    """Wait for the n-th question of a run; returns its row."""
    event = await pond.until(run_id, "input.requested", nth=nth)
    async with pond.db.org(pond.org_id) as con:
        request_id = uuid.UUID(event.data["request_id"])
        return await con.fetchrow("select * from input_request where request_id = $1", request_id)


async def _answer(pond: Pond, request: Any, answer: Any, principal: Principal = OPERATOR) -> None:
    async with pond.db.org(pond.org_id) as con:
        readied = await resolve(con, pond.org_id, request["request_id"], principal, answer)
    if readied.queue:
        pond.hints.wake([readied.queue])


async def _step_states(pond: Pond, run_id: uuid.UUID) -> dict[str, str]:
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch("select step_key, state from step where run_id = $1", run_id)
    return {row["step_key"]: row["state"] for row in rows}


async def test_a_marker_stands_before_the_function_runs_and_its_result_replaces_it(
    pond: Pond,
) -> None:
    till = Till("hang")
    _register(pond, till)
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("trip")
        await asyncio.wait_for(till.entered.wait(), DEADLINE_S)
        assert await _step_states(pond, run_id) == {"book:0": "begun"}
        assert await pond.count("step", "effect = 'once'") == 1
    till = Till()
    pond.registry.steps.clear()
    _register(pond, till)
    async with pond.worker():
        second = await pond.submit("trip")
        assert (await pond.ended(second))["output"] == "booked 1"
        assert await _step_states(pond, second) == {"book:0": "done"}
    assert await pond.kinds(second) == [
        "run.queued",
        "run.started",
        "step.started",
        "step.succeeded",
        "run.succeeded",
    ]


async def test_an_error_declared_not_done_is_retried(pond: Pond) -> None:
    till = Till(NotDone("the till is closed"), NotDone("still closed"))
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        assert (await pond.ended(run_id))["output"] == "booked 3"
    assert (await pond.kinds(run_id)).count("step.retrying") == 2
    assert await pond.count("input_request") == 0


async def test_not_done_too_often_fails_the_step_without_a_question(pond: Pond) -> None:
    till = Till(*(NotDone("closed") for _ in range(5)))
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        assert (await pond.ended(run_id))["output"] == "failed: not_done"
    assert till.calls == 3


async def test_a_long_backoff_of_not_done_waits_without_a_slot(pond: Pond) -> None:
    closed = NotDone("closed")
    closed.retry_after_s = 1.2  # type: ignore[attr-defined]
    till = Till(closed)
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        await pond.until(run_id, "run.waiting")
        assert (await pond.ended(run_id))["output"] == "booked 2"


@pytest.mark.parametrize(
    ("outcome", "options"),
    [
        (ConnectionError("reset"), {}),
        (ValueError("odd"), {}),
        ("hang", {"timeout_s": 0.1}),
        ("not a booking", {}),
    ],
    ids=["connection", "error", "timeout", "result"],
)
async def test_any_other_end_is_unknown_and_a_human_is_asked(
    pond: Pond, outcome: Any, options: dict[str, Any]
) -> None:
    till = Till(outcome)
    _register(pond, till, **options)
    async with pond.worker():
        run_id = await pond.submit("trip")
        request = await _request(pond, run_id)
        await pond.until(run_id, "run.awaiting_input")
        assert await _step_states(pond, run_id) == {"book:0": "unknown"}
        key = f"{pond.org_id}:{run_id}:book:0"
        assert (request["kind"], request["role"]) == ("outcome", "operator")
        assert "book" in request["title"]
        assert key in request["title"]
        assert orjson.loads(request["proposal"])["idempotency_key"] == key
        await _answer(pond, request, {"outcome": "done", "output": {"number": 7}})
        assert (await pond.ended(run_id))["output"] == "booked 7"
    assert till.calls == 1
    kinds = await pond.kinds(run_id)
    assert [kind for kind in kinds if kind.startswith(("step", "input"))] == [
        "step.started",
        "step.unknown",
        "input.requested",
        "input.resolved",
        "step.succeeded",
    ]


async def test_not_done_by_a_human_tries_again_and_may_ask_again(pond: Pond) -> None:
    till = Till(ValueError("odd"), ValueError("odd again"))
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        for nth in (1, 2):
            await _answer(pond, await _request(pond, run_id, nth), {"outcome": "not_done"})
        assert (await pond.ended(run_id))["output"] == "booked 3"
    assert till.calls == 3


async def test_fail_by_a_human_fails_the_step(pond: Pond) -> None:
    till = Till(ValueError("odd"))
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        await _answer(pond, await _request(pond, run_id), {"outcome": "fail"})
        assert (await pond.ended(run_id))["output"] == "failed: outcome_denied"
    assert till.calls == 1


async def test_an_answer_has_to_fit_the_step_and_its_role_and_counts_once(pond: Pond) -> None:
    till = Till(ValueError("odd"))
    _register(pond, till, ask_role="cashier")
    cashier = Principal(org_id=0, subject="user:cash", roles=frozenset({"cashier"}))
    async with pond.worker():
        run_id = await pond.submit("trip")
        request = await _request(pond, run_id)
        for wrong in (
            {"outcome": "perhaps"},
            {"outcome": "done"},
            {"outcome": "done", "output": {"number": "seven"}},
            {"outcome": "not_done", "else": 1},
        ):
            with pytest.raises(InvalidInput):
                await _answer(pond, request, wrong, cashier)
        done = {"outcome": "done", "output": {"number": 7}}
        with pytest.raises(Forbidden):
            await _answer(pond, request, done)
        await _answer(pond, request, done, cashier)
        with pytest.raises(Conflict):
            await _answer(pond, request, done, cashier)
        assert (await pond.ended(run_id))["output"] == "booked 7"


async def test_a_drained_try_is_unknown_to_the_next_attempt(pond: Pond) -> None:
    till = Till("hang")
    _register(pond, till)
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("trip")
        await asyncio.wait_for(till.entered.wait(), DEADLINE_S)
    assert "run.released" in await pond.kinds(run_id)
    async with pond.worker():
        await _answer(pond, await _request(pond, run_id), {"outcome": "not_done"})
        assert (await pond.ended(run_id))["output"] == "booked 2"


async def test_cancel_of_a_try_in_flight_asks_and_ends_as_cancelled_once_answered(
    pond: Pond,
) -> None:
    till = Till("hang")
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        await asyncio.wait_for(till.entered.wait(), DEADLINE_S)
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == RunState.RUNNING
        pond.hints.cancelled([run_id])
        request = await _request(pond, run_id)
        await pond.until(run_id, "run.awaiting_input")
        # Asking again to cancel does not end it either: it awaits the answer.
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == RunState.QUEUED
        await pond.until(run_id, "run.awaiting_input", nth=2)
        assert await pond.count("input_request", "state = 'pending'") == 1
        await _answer(pond, request, {"outcome": "done", "output": {"number": 7}})
        row = await pond.ended(run_id)
    assert row["outcome"] == "cancelled"
    assert till.calls == 1
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0


async def test_cancel_may_skip_the_question(pond: Pond) -> None:
    till = Till(ValueError("odd"))
    _register(pond, till)
    async with pond.worker():
        run_id = await pond.submit("trip")
        await pond.until(run_id, "run.awaiting_input")
        async with pond.db.org(pond.org_id) as con:
            state = await cancel(con, pond.org_id, run_id, "user:test", skip_endings=True)
        assert state == RunState.CANCELLED
        assert (await pond.events(run_id))[-1].data["endings"] == "skipped"
    assert await pond.count("input_request", "state = 'cancelled'") == 1


async def test_a_time_limit_of_the_flow_does_not_cut_a_try_short(pond: Pond) -> None:
    async def book(step_ctx: StepContext) -> int:
        await asyncio.sleep(0.4)
        return 7

    booked = step("book", effect="once", registry=pond.registry)(book)

    async def limited(ctx: Context, _: None) -> int:
        async with asyncio.timeout(0.1):
            return await ctx.step(booked)

    pond.flow(limited)
    async with pond.worker():
        assert (await pond.ended(await pond.submit("limited")))["output"] == 7


async def test_a_branch_in_doubt_parks_and_the_others_go_on(pond: Pond) -> None:
    till = Till(ValueError("odd"))
    booked = till.step(registry=pond.registry)

    async def both(ctx: Context, _: None) -> list[int]:
        async def slow() -> int:
            await asyncio.sleep(0.3)
            return 2

        first, second = await ctx.parallel(ctx.step(booked), ctx.step("slow", slow))
        return [first.number, second]

    pond.flow(both)
    async with pond.worker():
        run_id = await pond.submit("both")
        request = await _request(pond, run_id)
        await pond.until(run_id, "run.awaiting_input")
        assert (await _step_states(pond, run_id))["~0.1/slow:0"] == "done"
        await _answer(pond, request, {"outcome": "done", "output": {"number": 1}})
        assert (await pond.ended(run_id))["output"] == [1, 2]


async def test_a_worker_killed_in_the_middle_leaves_a_question_and_no_second_call(
    pond: Pond, tmp_path: Path
) -> None:
    data = {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate")}
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.once", data)
        async with asyncio.timeout(DEADLINE_S):
            while not (tmp_path / "log").exists():
                await asyncio.sleep(0.02)
        first.kill()
        await first.wait()
        (tmp_path / "gate").touch()
        async with worker_process(pond):
            request = await _request(pond, run_id)
            await pond.until(run_id, "run.awaiting_input")
            assert await _step_states(pond, run_id) == {"tests.charge:0": "unknown"}
            await _answer(pond, request, {"outcome": "done", "output": 5})
            row = await pond.ended(run_id)
    assert row["output"] == 5
    assert "run.rescued" in await pond.kinds(run_id)
    assert (tmp_path / "log").read_text().split() == ["second"]


async def test_a_step_over_its_time_is_transient_when_it_may_be_repeated(pond: Pond) -> None:
    calls = 0

    async def late(ctx: Context, _: None) -> int:
        async def hang_at_first() -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                await asyncio.Event().wait()
            return calls

        return await ctx.step("hang", hang_at_first, retry=QUICK, timeout_s=0.1)

    pond.flow(late)
    async with pond.worker():
        run_id = await pond.submit("late")
        assert (await pond.ended(run_id))["output"] == 2
    (retrying,) = [one for one in await pond.events(run_id) if one.kind == "step.retrying"]
    assert retrying.data["error"]["code"] == "timeout"


async def test_a_result_on_its_way_to_the_database_is_stored_before_a_drain_gives_the_run_back(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    till = Till()
    _register(pond, till)
    is_sent, is_drained, may_store = asyncio.Event(), asyncio.Event(), asyncio.Event()
    unwind = Attempt.unwind

    async def probe(point: str) -> None:
        if point in ("before:record", "before:commit") and till.calls:
            is_sent.set()
            await may_store.wait()

    def noted(attempt: Attempt, reason: str) -> None:
        unwind(attempt, reason)
        if reason == "drained":
            is_drained.set()

    async def drain() -> None:
        async with pond.worker(drain_s=0.05):
            await asyncio.wait_for(is_sent.wait(), DEADLINE_S)

    monkeypatch.setattr(pond.engine_db, "_probe", probe)
    monkeypatch.setattr(Attempt, "unwind", noted)
    run_id = await pond.submit("trip")
    draining = asyncio.create_task(drain())
    await asyncio.wait_for(is_drained.wait(), DEADLINE_S)
    released = asyncio.create_task(pond.until(run_id, "run.released"))
    await asyncio.wait({released}, timeout=0.5)  # as long as it would take
    may_store.set()
    await draining
    await asyncio.wait_for(released, DEADLINE_S)
    async with pond.worker():
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    assert till.calls == 1
    assert "input.requested" not in await pond.kinds(run_id)
