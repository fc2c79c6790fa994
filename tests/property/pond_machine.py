"""The engine's states under any order of what can happen to runs, beside a plain model of them.

A Hypothesis state machine over a real database, run by test_pond_machine.py: each rule does one thing through
the engine's own functions and to the model; after each rule pond_checks.py compares the two.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.property import pond_checks
from tests.property.conftest import LEASE_S, Ground
from tests.property.pond_model import SLOTS, Model, ModelRun, ModelWorker

from millpond.db.queries import queries
from millpond.engine import questions, timers, waits
from millpond.engine.claim import Claimer
from millpond.engine.commit import FinishWrite, StepWrite
from millpond.engine.leases import Lease
from millpond.engine.maintenance import Maintenance
from millpond.engine.operations import cancel
from millpond.engine.resting import Rest, rest_alone
from millpond.engine.submit import submit
from millpond.errors import Conflict, LeaseLost
from millpond.types import Intent, Principal

R = TypeVar("R")
HUMAN = Principal(org_id=0, subject="user:kim", roles=frozenset({"support"}))
LONG_S = 3600.0
ABLE = ["model.flow@1", "model.flow@1!"]
_SQL = queries("maintenance")

nths = st.integers(0, 50)


class PondMachine(RuleBasedStateMachine):
    """Rules of what callers, workers, people and time do."""

    def __init__(self, ground: Ground) -> None:
        super().__init__()
        self.ground = ground
        self.model = Model()

    @initialize(delayed=st.booleans())
    def begin(self, delayed: bool) -> None:
        """Start from two workers and a few runs."""
        self.ground.run(self.ground.empty())
        self.start_worker()
        self.start_worker()
        self.submit(org=0, count=3, priority=0, delayed=delayed)
        self.submit(org=1, count=2, priority=5, delayed=False)

    # Callers

    @rule(
        org=nths, count=st.integers(1, 3), priority=st.sampled_from([0, 5]), delayed=st.booleans()
    )
    def submit(self, org: int, count: int, priority: int, delayed: bool) -> None:
        org_id = self.ground.org_ids[org % 2]
        intents = [
            Intent(
                org_id=org_id,
                flow="model.flow",
                version=1,
                queue="default",
                input=b"null",
                subject="user:test",
                priority=priority,
                delay_s=LONG_S if delayed else 0.0,
            )
            for _ in range(count)
        ]
        self.ground.run(self._in_org(org_id, lambda con: submit(con, intents)))
        for one in intents:
            state = "scheduled" if delayed else "queued"
            run = ModelRun(org_id, one.run_id, state, [f"run.{state}"])
            if delayed:
                run.timers[""] = "start"
            self.model.runs[one.run_id] = run

    @precondition(lambda self: any(run.is_live for run in self.model.runs.values()))
    @rule(nth=nths)
    def cancel(self, nth: int) -> None:
        run = self._pick([run for run in self.model.runs.values() if run.is_live], nth)
        self.ground.run(self._cancel(run))
        if run.state != "running":
            self.model.ended(run, "cancelled")
        elif not run.is_cancel_requested:
            run.is_cancel_requested = True
            run.kinds.append("run.cancel_requested")

    @precondition(lambda self: any(not run.is_live for run in self.model.runs.values()))
    @rule(nth=nths)
    def cancel_what_has_ended(self, nth: int) -> None:
        run = self._pick([run for run in self.model.runs.values() if not run.is_live], nth)
        if run.state == "cancelled":
            self.ground.run(self._cancel(run))  # nothing changes: the model holds it
            return
        with pytest.raises(Conflict):
            self.ground.run(self._cancel(run))

    @precondition(lambda self: self._asked())
    @rule(nth=nths)
    def resolve(self, nth: int) -> None:
        run = self._pick(self._asked(), nth)
        request_id = run.request_id
        assert request_id is not None

        async def answer() -> None:
            async with self.ground.db.org(run.org_id) as con:
                await questions.resolve(con, run.org_id, request_id, HUMAN, answer=True)

        self.ground.run(answer())
        with pytest.raises(Conflict):
            self.ground.run(answer())
        key = next(
            key for key, state in run.steps.items() if key[:3] == "ask" and state == "waiting"
        )
        run.steps[key] = "done"
        run.timers.pop(key, None)
        run.request_id = None
        run.kinds.append("input.resolved")
        if run.state in ("waiting", "awaiting_input"):
            run.state = "queued"

    # Workers

    @precondition(lambda self: len(self._present()) < 3)
    @rule()
    def start_worker(self) -> None:
        worker = ModelWorker(uuid.uuid4())
        sql = """insert into worker (worker_id, host, pid, queues, capabilities, expires_at)
                 values ($1, 'here', 1, '{}', $2, clock_timestamp() + interval '1 hour')"""
        self.ground.run(self._as_engine(lambda con: con.execute(sql, worker.worker_id, ABLE)))
        self.model.workers.append(worker)

    @precondition(lambda self: self._roomy() and self.model.of("queued"))
    @rule(nth=nths, want=st.integers(1, SLOTS))
    def claim(self, nth: int, want: int) -> None:
        worker = self._pick(self._roomy(), nth)
        free = min(want, SLOTS - self.model.in_use(worker))
        expected = min(free, len(self.model.of("queued")))
        claimer = self._claimer(worker)
        got, has_more, rounds = 0, True, 0
        while got < free and has_more:
            claimed, has_more = self.ground.run(claimer.claim({"default": free - got}))
            for one in claimed:
                self.model.claimed(one.lease, worker)
            got += len(claimed)
            rounds += 1
            assert rounds < 50, "claims go on without claiming"
        assert got == expected, "a slot stays free beside work"

    @precondition(lambda self: any(worker.is_gone for worker in self.model.workers))
    @rule(nth=nths)
    def claim_under_a_session_that_is_gone(self, nth: int) -> None:
        worker = self._pick([worker for worker in self.model.workers if worker.is_gone], nth)
        with pytest.raises(LeaseLost):
            self.ground.run(self._claimer(worker).claim({"default": 1}))

    @rule(nth=nths)
    def beat(self, nth: int) -> None:
        worker = self._pick(self.model.workers, nth)
        sql = _SQL["beat"]
        found = self.ground.run(
            self._as_engine(lambda con: con.fetchval(sql, worker.worker_id, LONG_S))
        )
        assert (found is None) == worker.is_gone
        worker.is_expired = worker.is_gone

    @precondition(lambda self: self.model.of("running"))
    @rule(nth=nths)
    def expire(self, nth: int) -> None:
        worker = self._pick(self._present(), nth)
        sql = (
            "update worker set expires_at = clock_timestamp() - interval '1 s' where worker_id = $1"
        )
        self.ground.run(self._as_engine(lambda con: con.execute(sql, worker.worker_id)))
        worker.is_expired = True

    @precondition(lambda self: any(worker.is_expired for worker in self._present()))
    @rule()
    def rescue(self) -> None:
        self.ground.run(Maintenance(self.ground.engine_db, lease_s=LEASE_S).rescue())
        self.model.rescued()

    # Attempts

    @precondition(lambda self: self._has_running())
    @rule(nth=nths)
    def step(self, nth: int) -> None:
        run, lease = self._running(nth)
        key = run.next_key("step")
        self.ground.run(self._record(lease, key))
        self._note_step(run, key)

    @precondition(lambda self: self.model.of("running"))
    @rule()
    def steps_of_all(self) -> None:
        """Record a step of every running run, and of every lost attempt, in one batch."""
        running = self.model.of("running")
        keys = [run.next_key("step") for run in running]
        lost = self.model.stale[-3:]

        async def record() -> list[Any]:
            writes = [
                self._record(run.lease, key)
                for run, key in zip(running, keys, strict=True)
                if run.lease is not None
            ]
            writes += [self._record(lease, "lost:0") for lease in lost]
            return await asyncio.gather(*writes, return_exceptions=True)

        ends = self.ground.run(record())
        assert ends[: len(running)] == [None] * len(running)
        assert all(isinstance(end, LeaseLost) for end in ends[len(running) :])
        for run, key in zip(running, keys, strict=True):
            self._note_step(run, key)

    @precondition(lambda self: self._has_running())
    @rule(nth=nths, is_over=st.booleans())
    def sleep(self, nth: int, is_over: bool) -> None:
        run, lease = self._running(nth)
        key = run.next_key("sleep")
        database = self.ground.engine_db
        self.ground.run(
            waits.record_sleep(database, lease, step_key=key, name="sleep", seconds=LONG_S)
        )
        run.steps[key], run.timers[key] = "waiting", "sleep"
        run.kinds.append("sleep.started")
        if is_over:
            self._let_fire(run)
        self._park(run, lease, key, is_human=False)

    @precondition(lambda self: self._has_running())
    @rule(nth=nths, expires=st.booleans(), is_over=st.booleans())
    def ask(self, nth: int, expires: bool, is_over: bool) -> None:
        run, lease = self._running(nth)
        if run.request_id is not None:
            return
        key = run.next_key("ask")
        question = questions.Question(
            name="ask",
            role="support",
            title="ask",
            form={"type": "boolean"},
            proposal=None,
            expires_in_s=LONG_S if expires else None,
            expiry_answer=None,
        )
        self.ground.run(
            questions.record_question(self.ground.engine_db, lease, step_key=key, question=question)
        )
        sql = "select request_id from input_request where run_id = $1 and step_key = $2"
        run.request_id = self.ground.run(
            self._as_engine(lambda con: con.fetchval(sql, run.run_id, key))
        )
        run.steps[key] = "waiting"
        run.kinds.append("input.requested")
        if expires:
            run.timers[key] = "expiry"
            if is_over:
                self._let_fire(run)
        self._park(run, lease, key, is_human=True)

    @precondition(lambda self: self._has_running())
    @rule(nth=nths)
    def back_off_step(self, nth: int) -> None:
        run, lease = self._running(nth)
        key = run.next_key("retry")
        self.ground.run(self._record(lease, key, state="retrying"))
        self.ground.run(
            waits.record_backoff(self.ground.engine_db, lease, step_key=key, delay_s=LONG_S)
        )
        run.steps[key], run.timers[key] = "retrying", "retry"
        run.kinds.append("step.retrying")
        self._park(run, lease, key, is_human=False)

    @precondition(lambda self: self._has_running())
    @rule(nth=nths)
    def back_off_body(self, nth: int) -> None:
        run, lease = self._running(nth)
        self.ground.run(
            waits.back_off(self.ground.engine_db, lease, delay_s=LONG_S, error={}, tries=1)
        )
        run.timers[""] = "retry"
        if run.is_cancel_requested:
            run.due.add("")
        run.kinds.append("run.retrying")
        run.came_to_a_wait()
        self.model.unleased(run, "waiting")

    @precondition(lambda self: self._has_running())
    @rule(nth=nths)
    def release(self, nth: int) -> None:
        run, lease = self._running(nth)
        self.ground.run(waits.release(self.ground.engine_db, lease, reason="drain"))
        run.kinds.append("run.released")
        self.model.unleased(run, "queued")

    @precondition(lambda self: self._has_running())
    @rule(nth=nths, outcome=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def finish(self, nth: int, outcome: str) -> None:
        run, lease = self._running(nth)
        self.ground.run(self._finish(lease, outcome))
        self.model.ended(run, outcome)

    @precondition(lambda self: self.model.stale)
    @rule(nth=nths, write=st.integers(0, 6))
    def write_by_a_lost_attempt(self, nth: int, write: int) -> None:
        lease = self._pick(self.model.stale, nth)
        with pytest.raises(LeaseLost):
            self.ground.run(self._stale_writes(lease)[write]())

    # Time

    @precondition(lambda self: any(run.timers for run in self.model.runs.values()))
    @rule(nth=nths)
    def fire(self, nth: int) -> None:
        self._let_fire(self._pick([run for run in self.model.runs.values() if run.timers], nth))

    @invariant()
    def database_is_as_the_model_says(self) -> None:
        self.ground.run(self._as_engine(lambda con: pond_checks.check(con, self.model)))

    # Parts of rules

    def _pick(self, members: list[R], nth: int) -> R:
        return members[nth % len(members)]

    def _has_running(self) -> bool:
        return bool(self.model.of("running") or (self._roomy() and self.model.of("queued")))

    def _running(self, nth: int) -> tuple[ModelRun, Lease]:
        """Return a running run; where none is, a worker claims first."""
        if not self.model.of("running"):
            self.claim(nth, SLOTS)
        run = self._pick(self.model.of("running"), nth)
        assert run.lease is not None
        return run, run.lease

    def _asked(self) -> list[ModelRun]:
        return [run for run in self.model.runs.values() if run.request_id is not None]

    def _present(self) -> list[ModelWorker]:
        return [worker for worker in self.model.workers if not worker.is_gone]

    def _roomy(self) -> list[ModelWorker]:
        return [worker for worker in self._present() if self.model.in_use(worker) < SLOTS]

    def _claimer(self, worker: ModelWorker) -> Claimer:
        return Claimer(
            self.ground.engine_db,
            worker_id=worker.worker_id,
            capabilities=ABLE,
            estimate_s=lambda _: 1.0,
        )

    def _note_step(self, run: ModelRun, key: str) -> None:
        run.steps[key], run.outputs[key] = "done", f'"{key}"'
        run.kinds.append("step.succeeded")

    def _let_fire(self, run: ModelRun) -> None:
        sql = "update timer set due_at = clock_timestamp() - interval '1 s' where run_id = $1"
        self.ground.run(self._as_engine(lambda con: con.execute(sql, run.run_id)))
        self.ground.run(timers.fire(self.ground.engine_db))
        run.due = set(run.timers)
        self.model.fired()

    def _park(self, run: ModelRun, lease: Lease, key: str, *, is_human: bool) -> None:
        self.ground.run(
            rest_alone(self.ground.engine_db, Rest(lease=lease, step_keys=[key], is_human=is_human))
        )
        is_over = run.steps[key] in ("done", "failed")
        self.model.parked(run, "awaiting_input" if is_human else "waiting", is_over=is_over)

    async def _record(self, lease: Lease, key: str, *, state: str = "done") -> None:
        kind = "step.succeeded" if state == "done" else "step.retrying"
        await self.ground.committer.record(
            StepWrite(
                lease=lease,
                step_key=key,
                name=key.partition(":")[0],
                state=state,
                output=f'"{key}"' if state == "done" else None,
                event_kind=kind,
                event_data="{}",
            )
        )

    async def _finish(self, lease: Lease, outcome: str) -> None:
        write = FinishWrite(lease=lease, outcome=outcome, event_data="{}")
        await self.ground.committer.finish(write)

    def _stale_writes(self, lease: Lease) -> list[Callable[[], Awaitable[Any]]]:
        database = self.ground.engine_db
        return [
            lambda: self._record(lease, "lost:0"),
            lambda: self._finish(lease, "succeeded"),
            lambda: rest_alone(database, Rest(lease=lease, step_keys=["lost:0"], is_human=False)),
            lambda: waits.release(database, lease, reason="lost"),
            lambda: waits.back_off(database, lease, delay_s=1.0, error={}, tries=1),
            lambda: waits.record_sleep(
                database, lease, step_key="lost:0", name="lost", seconds=LONG_S
            ),
            lambda: waits.record_backoff(database, lease, step_key="lost:0", delay_s=1.0),
        ]

    async def _cancel(self, run: ModelRun) -> None:
        async with self.ground.db.org(run.org_id) as con:
            await cancel(con, run.org_id, run.run_id, HUMAN.subject)

    async def _in_org(self, org_id: int, work: Callable[[Any], Awaitable[R]]) -> R:
        async with self.ground.db.org(org_id) as con:
            return await work(con)

    async def _as_engine(self, work: Callable[[Any], Awaitable[R]]) -> R:
        async with self.ground.engine_db.duty("test") as con:
            return await work(con)
