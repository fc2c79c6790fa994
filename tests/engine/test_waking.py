"""Strands that wait go on as soon as their wait is over, while others of the same attempt still work.

In most tests the working branch ends only after the waiting one has gone on: if the run had to park first,
it would never end.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_faults import worker_process
from tests.engine.test_signals import tell

from millpond.db.pool import EngineDatabase
from millpond.engine import waking
from millpond.engine.branches import Branch, Branches, Parked, Unwind
from millpond.engine.context import Context, SignalTimedOut, StepContext
from millpond.engine.history import just
from millpond.engine.operations import cancel
from millpond.engine.questions import resolve
from millpond.engine.registry import Step, step
from millpond.errors import NotDone, Transient
from millpond.retry import Retry
from millpond.types import Principal, RunState

OPERATOR = Principal(org_id=0, subject="user:kim", roles=frozenset({"operator"}))
DONE = just("sleep", "done", None, None)
SLOW_RETRY = Retry(max_tries=3, base_s=0)


class Verdict(BaseModel):
    ok: bool


@dataclass(eq=False)
class Work:
    """A step that stays until the test lets it end; counts how often it was begun."""

    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0

    async def stay(self) -> str:
        self.calls += 1
        self.begun.set()
        await self.may_end.wait()
        return "worked"


def beside(pond: Pond, waiting: Callable[[Context], Awaitable[Any]]) -> Work:
    """Register the flow `both`: a branch that waits and then lets the other one end."""
    work = Work()

    async def both(ctx: Context, _: None) -> list[Any]:
        async def wait_first() -> Any:
            ended = await waiting(ctx)
            await ctx.step("after", _same, ended)
            work.may_end.set()
            return ended

        return list(await ctx.parallel(wait_first(), ctx.step("work", work.stay)))

    pond.flow(both)
    return work


async def _same(value: Any) -> Any:
    return value


async def went_on_in_place(pond: Pond, run_id: uuid.UUID) -> Any:
    """Return what the waiting branch got; it got it in the first attempt, which never parked."""
    row = await pond.ended(run_id)
    assert row["outcome"] == "succeeded", row["error"]
    assert row["attempts"] == 1
    kinds = await pond.kinds(run_id)
    assert not {"run.waiting", "run.awaiting_input", "run.resumed"} & set(kinds)
    ended, worked = row["output"]
    assert worked == "worked"
    return ended


async def answer(pond: Pond, run_id: uuid.UUID, text: Any) -> None:
    event = await pond.until(run_id, "input.requested")
    async with pond.db.org(pond.org_id) as con:
        await resolve(con, pond.org_id, uuid.UUID(event.data["request_id"]), OPERATOR, text)


async def step_rows(pond: Pond, run_id: uuid.UUID) -> dict[str, tuple[str, int | None]]:
    """Return the state and place of every step by its key."""
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch("select step_key, state, seq from step where run_id = $1", run_id)
    return {row["step_key"]: (row["state"], row["seq"]) for row in rows}


async def test_a_sleep_ends_while_another_branch_works(pond: Pond) -> None:
    work = beside(pond, lambda ctx: ctx.sleep(1.2, name="nap"))
    async with pond.worker():
        run_id = await pond.submit("both")
        assert await went_on_in_place(pond, run_id) is None
    assert work.calls == 1
    assert await step_rows(pond, run_id) == {
        "~0.0/nap:0": ("done", 0),
        "~0.0/after:0": ("done", 1),
        "~0.1/work:0": ("done", 0),
    }


async def test_a_signal_reaches_its_branch_while_another_one_works(pond: Pond) -> None:
    async def told(ctx: Context) -> Any:
        return (await ctx.wait_event("go")).data

    beside(pond, told)
    async with pond.worker():
        run_id = await pond.submit("both")
        await pond.until(run_id, "signal.awaited")
        await tell(pond, run_id, "go", {"n": 7})
        assert await went_on_in_place(pond, run_id) == {"n": 7}


async def test_a_signal_that_does_not_come_in_time_is_raised_in_place(pond: Pond) -> None:
    async def told(ctx: Context) -> str:
        try:
            await ctx.wait_event("go", timeout_s=0.1)
        except SignalTimedOut:
            return "timed out"
        return "told"

    beside(pond, told)
    async with pond.worker():
        assert await went_on_in_place(pond, await pond.submit("both")) == "timed out"


async def test_an_answer_reaches_its_branch_while_another_one_works(pond: Pond) -> None:
    async def asked(ctx: Context) -> list[Any]:
        decision = await ctx.ask_human("ok", role="operator", form=Verdict)
        return [decision.answer.ok, decision.resolved_by]

    beside(pond, asked)
    async with pond.worker():
        run_id = await pond.submit("both")
        await answer(pond, run_id, {"ok": True})
        assert await went_on_in_place(pond, run_id) == [True, "user:kim"]


async def test_a_join_ends_while_another_branch_works(pond: Pond) -> None:
    may_end = asyncio.Event()

    async def small(ctx: Context, number: int) -> int:
        await ctx.step("hold", may_end.wait)
        return number + 1

    child = pond.flow(small)

    async def joined(ctx: Context) -> Any:
        return await ctx.run_flow(child, 41)

    beside(pond, joined)
    async with pond.worker():
        run_id = await pond.submit("both")
        await pond.until(run_id, "child.started")
        while not await pond.count("step", "kind = 'join' and state = 'waiting'"):
            await asyncio.sleep(0.01)
        may_end.set()
        assert await went_on_in_place(pond, run_id) == 42


async def test_a_long_backoff_ends_while_another_branch_works(pond: Pond) -> None:
    tries: list[int] = []

    def flaky() -> Step[Any, int]:
        async def ask(step_ctx: StepContext) -> int:
            tries.append(step_ctx.try_number)
            if len(tries) < 3:
                raise Transient("slow down", retry_after_s=1.2)
            return len(tries)

        return step("ask", retry=SLOW_RETRY, registry=pond.registry)(ask)

    asking = flaky()
    beside(pond, lambda ctx: ctx.step(asking))
    async with pond.worker():
        assert await went_on_in_place(pond, await pond.submit("both")) == 3
    assert tries == [1, 2, 3]


async def test_a_step_in_another_queue_comes_back_while_another_branch_works(pond: Pond) -> None:
    calls: list[int] = []

    async def double(step_ctx: StepContext, number: int) -> int:
        calls.append(number)
        if len(calls) == 1:
            raise Transient("slow down", retry_after_s=1.2)
        return 2 * number

    doubled = pond.step(double, queue="sql", retry=SLOW_RETRY)
    beside(pond, lambda ctx: ctx.step(doubled, 21))
    async with pond.worker({"default": 5, "sql": 1}):
        assert await went_on_in_place(pond, await pond.submit("both")) == 42
    assert calls == [21, 21]


async def test_what_became_of_a_once_step_is_told_in_place(pond: Pond) -> None:
    """Both a result that a human gives and the leave to try again."""
    tries: list[int] = []
    closed = NotDone("closed")
    closed.retry_after_s = 1.2  # type: ignore[attr-defined]

    async def book(step_ctx: StepContext) -> str:
        tries.append(step_ctx.try_number)
        if len(tries) == 1:
            raise ConnectionError("cut off")
        if len(tries) == 2:
            raise closed
        return f"booked at try {step_ctx.try_number}"

    booked = step("book", effect="once", retry=SLOW_RETRY, registry=pond.registry)(book)
    beside(pond, lambda ctx: ctx.step(booked))
    async with pond.worker():
        run_id = await pond.submit("both")
        await answer(pond, run_id, {"outcome": "not_done"})
        assert await went_on_in_place(pond, run_id) == "booked at try 3"

    tries.clear()
    pond.registry.flows.clear()
    beside(pond, lambda ctx: ctx.step(booked))
    async with pond.worker():
        run_id = await pond.submit("both")
        await answer(pond, run_id, {"outcome": "done", "output": "by phone"})
        assert await went_on_in_place(pond, run_id) == "by phone"
    assert tries == [1]


async def test_a_result_that_stands_apart_comes_whole(pond: Pond) -> None:
    """A child's result is copied beside the step's row where it stood beside the child's."""

    async def told(ctx: Context) -> Any:
        return (await ctx.wait_event("go")).data

    beside(pond, told)
    async with pond.worker():
        run_id = await pond.submit("both")
        await pond.until(run_id, "signal.awaited")
        async with pond.engine_db.duty("test") as con:
            body = (
                '[{"name":"go","data":"apart","sent_by":"x","sent_at":"2026-01-01T00:00:00+00:00"}]'
            )
            await con.execute(
                "insert into payload (org_id, run_id, slot, body) values ($1, $2, $3, $4)",
                pond.org_id,
                run_id,
                "step:~0.0/go:0",
                body,
            )
            await con.execute("update step set state = 'done' where kind = 'signal'")
        assert await went_on_in_place(pond, run_id) == "apart"


async def test_what_was_recorded_in_place_is_replayed_by_another_worker(pond: Pond) -> None:
    """The worker goes away after the woken branch's later steps; nothing of them runs again."""
    calls: list[str] = []
    past = asyncio.Event()
    work = Work()

    async def both(ctx: Context, _: None) -> list[Any]:
        async def note(word: str) -> str:
            calls.append(word)
            return word

        async def first() -> list[Any]:
            words = [await ctx.step("note", note, "before")]
            words.append((await ctx.wait_event("go")).data)
            words.append(await ctx.step("note", note, "between"))
            await ctx.sleep(1.1)
            words.append(await ctx.step("note", note, "after"))
            past.set()
            return words

        return list(await ctx.parallel(first(), ctx.step("work", work.stay)))

    pond.flow(both)
    async with pond.worker(drain_s=0.05):
        run_id = await pond.submit("both")
        await pond.until(run_id, "signal.awaited")
        await tell(pond, run_id, "go", "told")
        await asyncio.wait_for(past.wait(), DEADLINE_S)
    assert "run.waiting" not in await pond.kinds(run_id)
    before = await step_rows(pond, run_id)
    assert before == {
        "~0.0/note:0": ("done", 0),
        "~0.0/go:0": ("done", 1),
        "~0.0/note:1": ("done", 2),
        "~0.0/sleep:0": ("done", 3),
        "~0.0/note:2": ("done", 4),
    }
    work.may_end.set()
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == [["before", "told", "between", "after"], "worked"]
    assert row["attempts"] == 2
    assert calls == ["before", "between", "after"]
    assert await step_rows(pond, run_id) == {**before, "~0.1/work:0": ("done", 0)}


async def test_a_worker_killed_after_a_branch_was_woken_repeats_nothing_of_it(
    pond: Pond, tmp_path: Path
) -> None:
    data = {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate")}
    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.woken", data)
        await pond.until(run_id, "step.succeeded")
        first.kill()
        await first.wait()
    (tmp_path / "gate").touch()
    async with worker_process(pond):
        row = await pond.ended(run_id)
    assert row["outcome"] == "succeeded"
    assert row["attempts"] == 2
    words = (tmp_path / "log").read_text().split()
    assert words.count("late") == 1
    assert (await step_rows(pond, run_id))["~0.0/late:0"] == ("done", 1)


async def test_the_database_is_asked_only_while_some_wait_and_some_work(pond: Pond) -> None:
    asked = 0

    async def count(passage: str) -> None:
        nonlocal asked
        asked += passage == "before:wake"

    async def naps(ctx: Context, _: None) -> None:
        await ctx.parallel(ctx.sleep(1.1))
        await ctx.parallel(ctx.step("work", _same, 1), ctx.step("work", _same, 2))

    pond.flow(naps)
    work = beside(pond, lambda ctx: ctx.sleep(1.1))
    probed = await EngineDatabase.connect(pond.urls.engine, probe=count)
    async with replace(pond, engine_db=probed).worker():
        assert (await pond.ended(await pond.submit("naps")))["outcome"] == "succeeded"
        assert asked == 0
        await pond.ended(await pond.submit("both"))
        assert 0 < asked < 100
    await probed.close()
    assert work.calls == 1


async def test_a_wait_that_ends_as_the_last_working_branch_parks_is_not_lost(pond: Pond) -> None:
    """Signals come at every moment around the park of the whole; each run ends by its two signals."""
    parks: dict[int, asyncio.Event] = {}

    async def pair(ctx: Context, number: int) -> list[Any]:
        async def first() -> Any:
            return (await ctx.wait_event("one")).data

        async def second() -> Any:
            await ctx.step("hold", parks[number].wait)
            return (await ctx.wait_event("two")).data

        return list(await ctx.parallel(first(), second()))

    pond.flow(pair)
    async with pond.worker({"default": 60}):
        runs: list[uuid.UUID] = []
        for number in range(60):
            parks[number] = asyncio.Event()
            runs.append(await pond.submit("pair", number))
        for run_id in runs:
            await pond.until(run_id, "signal.awaited")

        async def race(number: int) -> None:
            await tell(pond, runs[number], "one", number)
            await asyncio.sleep(0.004 * number)  # around the moments of the poll
            parks[number].set()
            if number % 2:
                await pond.until(runs[number], "signal.awaited", nth=2)
            await tell(pond, runs[number], "two", -number)

        await asyncio.gather(*(race(number) for number in range(60)))
        attempts = set()
        for number, run_id in enumerate(runs):
            row = await pond.ended(run_id)
            assert row["output"] == [number, -number]
            attempts.add(row["attempts"])
        assert len(attempts) > 1, "some went on in place, some parked as a whole"


async def test_a_cancel_ends_woken_waiting_and_working_branches_alike(pond: Pond) -> None:
    woken, ended = asyncio.Event(), []
    never = asyncio.Event()

    async def three(ctx: Context, _: None) -> None:
        async def watched(name: str, body: Awaitable[Any]) -> None:
            try:
                await body
            except Unwind as unwind:
                ended.append((name, unwind.reason))
                raise

        async def goes_on() -> None:
            await ctx.wait_event("go")
            woken.set()
            await ctx.step("hold", never.wait)

        await ctx.parallel(
            watched("woken", goes_on()),
            watched("waiting", ctx.sleep(3600)),
            watched("working", ctx.step("work", never.wait)),
        )

    pond.flow(three)
    async with pond.worker():
        run_id = await pond.submit("three")
        await pond.until(run_id, "signal.awaited")
        await tell(pond, run_id, "go")
        await asyncio.wait_for(woken.wait(), DEADLINE_S)
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == RunState.RUNNING
        pond.hints.cancelled([run_id])
        row = await pond.ended(run_id)
    assert row["outcome"] == "cancelled"
    assert sorted(ended) == [(name, "cancelled") for name in ("waiting", "woken", "working")]
    assert await pond.count("timer") == 0


async def test_branches_that_are_woken_keep_to_the_bound_of_their_map(pond: Pond) -> None:
    under_way, most = 0, 0
    order: list[int] = []
    may_end = asyncio.Event()

    async def fan(ctx: Context, count: int) -> list[int]:
        async def work(number: int) -> int:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            order.append(number)
            await asyncio.sleep(0.01)
            under_way -= 1
            return number

        async def item(number: int) -> int:
            await ctx.wait_event("go")
            return await ctx.step("work", work, number)

        results, _ = await ctx.parallel(
            ctx.map(item, range(count), limit=3), ctx.step("hold", may_end.wait)
        )
        may_end.set()
        return list(results)

    async def all_over(run_id: uuid.UUID) -> None:
        await pond.until(run_id, "step.succeeded", nth=12)
        may_end.set()

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan", 12)
        await pond.until(run_id, "signal.awaited", nth=12)
        ended = asyncio.create_task(all_over(run_id))
        for _ in range(12):
            await tell(pond, run_id, "go")
        row = await pond.ended(run_id)
        await ended
    assert row["attempts"] == 1
    assert row["output"] == list(range(12))
    assert sorted(order) == list(range(12))
    assert most == 3


async def test_a_woken_branch_goes_before_those_not_begun(pond: Pond) -> None:
    order: list[str] = []
    gates = {number: asyncio.Event() for number in range(3)}

    async def fan(ctx: Context, _: None) -> None:
        async def item(number: int) -> None:
            order.append(f"begun {number}")
            if number == 0:
                await ctx.wait_event("go")
                order.append("woken 0")
                return
            await ctx.step("work", gates[number].wait)

        await ctx.map(item, range(3), limit=1)

    pond.flow(fan)
    async with pond.worker() as worker:
        run_id = await pond.submit("fan")
        await pond.until(run_id, "signal.awaited")
        await tell(pond, run_id, "go")
        await until_known(worker, "~0.0/go:0")
        gates[1].set()
        gates[2].set()
        assert (await pond.ended(run_id))["attempts"] == 1
    assert order == ["begun 0", "begun 1", "woken 0", "begun 2"]


async def until_known(worker: Any, step_key: str) -> None:
    """Wait until a worker knows that a wait is over, whose strand has no room to go on yet."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for attempt in worker._attempts:
                for one in attempt.context._branches.parked:
                    if one.step_key == step_key and one.end is not None:
                        return
            await asyncio.sleep(0.01)


async def test_with_bound_waiting_a_woken_branch_has_kept_its_place(pond: Pond) -> None:
    order: list[str] = []
    may_end = asyncio.Event()

    async def fan(ctx: Context, _: None) -> None:
        async def item(number: int) -> None:
            order.append(f"begun {number}")
            await ctx.wait_event(f"go {number}")
            order.append(f"woken {number}")

        await ctx.parallel(
            ctx.map(item, range(3), limit=2, bound_waiting=True), ctx.step("hold", may_end.wait)
        )

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan")
        await pond.until(run_id, "signal.awaited", nth=2)
        await tell(pond, run_id, "go 1")
        await pond.until(run_id, "signal.awaited", nth=3)
        await tell(pond, run_id, "go 2")
        await tell(pond, run_id, "go 0")
        while order.count("woken 0") + order.count("woken 2") < 2:
            await asyncio.sleep(0.01)
        may_end.set()
        assert (await pond.ended(run_id))["attempts"] == 1
    assert order[:4] == ["begun 0", "begun 1", "woken 1", "begun 2"]


async def test_a_branch_below_a_waiting_branch_takes_a_place_of_each_bound_above_it(
    pond: Pond,
) -> None:
    under_way, most = 0, 0
    may_end = asyncio.Event()

    async def fan(ctx: Context, _: None) -> None:
        async def work() -> None:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.02)
            under_way -= 1

        async def item(number: int) -> None:
            async def one(_: int) -> None:
                await ctx.wait_event("go")
                await ctx.step("work", work)

            await ctx.map(one, range(2), limit=1)

        await ctx.parallel(ctx.map(item, range(4), limit=2), ctx.step("hold", may_end.wait))

    pond.flow(fan)
    async with pond.worker():
        run_id = await pond.submit("fan")
        await pond.until(run_id, "signal.awaited", nth=8)
        for _ in range(8):
            await tell(pond, run_id, "go")
        await pond.until(run_id, "step.succeeded", nth=8)
        may_end.set()
        assert (await pond.ended(run_id))["attempts"] == 1
    assert most == 2


async def test_a_lost_lease_tells_nothing(pond: Pond) -> None:
    """The database is asked under the token; one that is gone wakes no strand."""
    work = Work()
    woken: list[Any] = []

    async def both(ctx: Context, _: None) -> None:
        async def first() -> None:
            woken.append(await ctx.wait_event("go"))

        await ctx.parallel(first(), ctx.step("work", work.stay))

    pond.flow(both)
    async with pond.worker(drain_s=0.05) as worker:
        run_id = await pond.submit("both")
        await pond.until(run_id, "signal.awaited")
        [attempt] = worker._attempts
        [parked] = attempt.context._branches.parked
        mixed = waking.Mixed()
        stale = attempt.claimed.lease._replace(token=uuid.uuid4())
        mixed.add(stale, attempt.context._branches)
        async with pond.engine_db.duty("test") as con:
            await con.execute("update item set token = gen_random_uuid()")
        await tell(pond, run_id, "go")
        await waking.wake(pond.engine_db, mixed)
        assert parked.end is None
        assert woken == []


@dataclass(eq=False)
class Strand:
    """A strand that waits in an attempt whose own strand works; `ended` is how its wait ended for it."""

    branches: Branches
    branch: Branch
    mixed: waking.Mixed
    task: asyncio.Task[None]
    ended: list[str]

    @classmethod
    async def parked(cls) -> tuple[Strand, Parked]:
        """Return one that waits by now, with its wait."""
        branches, mixed = Branches(asyncio.get_running_loop()), waking.Mixed()
        own, root = asyncio.current_task(), Branch("")
        assert own is not None
        branches.enter(own, root)
        branch = Branch("~0.0/", parent=root)
        ended: list[str] = []
        lease: Any = object()
        branches.on_mixed = lambda one: mixed.add(lease, one)

        async def wait() -> None:
            try:
                end = await branches.park(branch, "~0.0/x:0", is_human=False)
                ended.append(end.state)
            except Unwind as unwind:
                ended.append(unwind.reason)
            except asyncio.CancelledError:
                ended.append("time limit")

        task = asyncio.create_task(wait())
        branches.enter(task, branch)
        await mixed.some()
        [(_, _, parked)] = mixed.waits()
        return cls(branches, branch, mixed, task, ended), parked


async def test_a_closed_attempt_is_forgotten_and_its_strands_are_not_woken() -> None:
    strand, parked = await Strand.parked()
    strand.branches.close("lost")
    strand.branches.wake(parked, DONE)
    await strand.task
    assert strand.ended == ["lost"]
    assert strand.mixed.waits() == []


@pytest.mark.parametrize("is_woken_first", [True, False])
async def test_a_time_limit_and_the_end_of_the_wait_at_one_moment_count_once(
    is_woken_first: bool,
) -> None:
    strand, parked = await Strand.parked()
    assert strand.branch.going == 0
    if is_woken_first:
        strand.branches.wake(parked, DONE)
        strand.task.cancel()
    else:
        strand.task.cancel()
        strand.branches.wake(parked, DONE)
    await strand.task
    assert strand.ended == ["time limit"]
    assert strand.branch.going == 1
    assert strand.branches.parked == []
    assert strand.branches.closed is None


async def test_a_cancel_between_waking_and_going_on_unwinds_the_strand() -> None:
    strand, parked = await Strand.parked()
    strand.branches.wake(parked, DONE)
    strand.branches.close("cancelled")
    await strand.task
    assert strand.ended == ["cancelled"]
