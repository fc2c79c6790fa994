"""The result of a run's last step goes with the run's end; whatever comes between finds it stored."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine import performing
from millpond.engine.commit import Committer, FinishWrite
from millpond.engine.context import Context, StepFailed
from millpond.engine.recording import Recorder
from millpond.errors import Permanent, Unavailable


@pytest.fixture(autouse=True)
def however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let results be held also where a step took long because the machine is busy."""
    monkeypatch.setattr(performing, "ANNOUNCE_S", 60.0)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[FinishWrite]:
    """The ends that the group commit is given."""
    found: list[FinishWrite] = []
    finish = Committer.finish

    def noted(self: Committer, write: FinishWrite) -> asyncio.Future[None]:
        found.append(write)
        return finish(self, write)

    monkeypatch.setattr(Committer, "finish", noted)
    return found


async def one(value: Any = 1) -> Any:
    return value


async def refuse(pond: Pond, table: str, when: str) -> None:
    """Let Postgres refuse rows that fulfil a condition."""
    con = await asyncpg.connect(pond.urls.owner)
    try:
        await con.execute(
            "create function public.refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'refused' using errcode = '22000'; end $$"
        )
        await con.execute(
            f"create trigger refuse before insert or update on millpond.{table} for each row "
            f"when ({when}) execute function public.refuse()"
        )
    finally:
        await con.close()


async def stored(pond: Pond, run_id: uuid.UUID) -> dict[str, str]:
    """Return the states of a run's steps by name."""
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select name, state from step where run_id = $1", run_id)
    return dict(rows)


async def test_the_last_result_is_stored_with_the_end(pond: Pond, ends: list[FinishWrite]) -> None:
    async def three(ctx: Context, _: None) -> list[int]:
        return [await ctx.step(f"s{n}", one, n) for n in range(3)]

    flow = pond.flow(three)
    async with pond.worker():
        runs = [await pond.submit(flow) for _ in range(5)]
        rows = [await pond.ended(run) for run in runs]
    assert [row["output"] for row in rows] == [[0, 1, 2]] * 5
    # Each step was held for the end once at least, and of these the last one is not left out later.
    assert [end.last and end.last.name for end in ends] == ["s2"] * 5
    for run in runs:
        events = await pond.events(run)
        assert [event.event_no for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events][-4:] == ["step.succeeded"] * 3 + ["run.succeeded"]
        assert [event.step_key for event in events][-4:] == ["s0:0", "s1:0", "s2:0", None]
        assert await stored(pond, run) == dict.fromkeys(["s0", "s1", "s2"], "done")
    assert (
        await pond.count("step", "finished_at < started_at or seq is null or output is null") == 0
    )


async def test_a_step_begins_after_the_results_before_it_are_stored(pond: Pond) -> None:
    seen: list[list[str]] = []

    async def look(run_id: uuid.UUID) -> None:
        seen.append(sorted(await stored(pond, run_id)))

    async def line(ctx: Context, _: None) -> None:
        await ctx.step("a", one)
        await ctx.step("b", look, ctx.run_id)
        await ctx.step("c", one)
        await ctx.parallel(ctx.step("d", look, ctx.run_id), ctx.step("e", look, ctx.run_id))
        await ctx.step("f", one)
        await ctx.map(lambda n: ctx.step("g", look, ctx.run_id), [1])

    flow = pond.flow(line)
    async with pond.worker():
        row = await pond.ended(await pond.submit(flow))
    assert row["outcome"] == "succeeded"
    assert seen[0] == ["a"]
    assert {"a", "b", "c"} <= set(seen[1]) & set(seen[2])
    assert {"a", "b", "c", "d", "e", "f"} <= set(seen[3])


async def test_a_result_is_stored_as_soon_as_the_flow_waits_for_anything(
    pond: Pond, ends: list[FinishWrite]
) -> None:
    gate = asyncio.Event()

    async def waits(ctx: Context, _: None) -> None:
        await ctx.step("a", one)
        await gate.wait()

    flow = pond.flow(waits)
    async with pond.worker():
        run = await pond.submit(flow)
        await pond.until(run, "step.succeeded")
        assert await stored(pond, run) == {"a": "done"}
        gate.set()
        row = await pond.ended(run)
    assert row["outcome"] == "succeeded"
    assert [end.last for end in ends] == [None]


async def test_a_flow_that_fails_after_its_last_step_keeps_that(pond: Pond) -> None:
    async def fails(ctx: Context, _: None) -> None:
        await ctx.step("a", one)
        raise Permanent("no")

    flow = pond.flow(fails)
    async with pond.worker():
        run = await pond.submit(flow)
        row = await pond.ended(run)
    assert row["outcome"] == "failed"
    assert await stored(pond, run) == {"a": "done"}
    assert (await pond.kinds(run))[-2:] == ["step.succeeded", "run.failed"]


async def test_waits_after_a_step_lose_nothing_of_it(pond: Pond) -> None:
    async def naps(ctx: Context, _: None) -> list[Any]:
        first = await ctx.step("a", one, uuid.uuid4().hex)
        await ctx.sleep(1.5)
        second = await ctx.step("b", one, uuid.uuid4().hex)
        await ctx.emit("done")
        return [first, second]

    flow = pond.flow(naps)
    async with pond.worker():
        run = await pond.submit(flow)
        row = await pond.ended(run)
    async with pond.engine_db.duty("test") as con:
        outputs = await con.fetch(
            "select output #>> '{}' from step where run_id = $1 and kind = 'step' order by name",
            run,
        )
    assert row["output"] == [text for (text,) in outputs]


async def test_the_end_of_a_child_has_its_last_result_too(
    pond: Pond, ends: list[FinishWrite]
) -> None:
    async def below(ctx: Context, _: None) -> int:
        return await ctx.step("a", one, 7)

    async def above(ctx: Context, _: None) -> Any:
        child = await ctx.start("below", None)
        return await ctx.join(child)

    pond.flow(below)
    flow = pond.flow(above)
    async with pond.worker():
        run = await pond.submit(flow)
        row = await pond.ended(run)
    assert row["output"] == 7
    assert [end.last is not None for end in ends] == [True, False]
    assert await pond.count("step", "name = 'a' and state = 'done'") == 1
    assert await pond.count("event", "kind = 'step.succeeded' and step_key = 'a:0'") == 1


async def test_a_last_result_that_is_refused_fails_its_step_in_the_flow(pond: Pond) -> None:
    await refuse(pond, "step", "new.name = 'bad' and new.state = 'done'")
    called: list[str] = []

    async def bad() -> int:
        called.append("bad")
        return 1

    async def careful(ctx: Context, _: None) -> str:
        try:
            await ctx.step("bad", bad)
        except StepFailed:
            return "caught"
        return "stored"

    async def careless(ctx: Context, _: None) -> int:
        return await ctx.step("bad", bad)

    async def goes_on(ctx: Context, _: None) -> int:
        await ctx.step("bad", bad)
        return await ctx.step("never", one)

    flows = pond.flow(careful), pond.flow(careless), pond.flow(goes_on)
    async with pond.worker():
        caught = await pond.submit(flows[0])
        failed = [await pond.submit(flow) for flow in flows[1:]]
        healthy = await pond.submit(flows[0])
        rows = [await pond.ended(run) for run in (caught, *failed, healthy)]
    assert rows[0]["output"] == rows[3]["output"] == "caught"
    assert [row["outcome"] for row in rows[1:3]] == ["failed", "failed"]
    assert [row["error"]["step"] for row in rows[1:3]] == ["bad", "bad"]
    assert called == ["bad"] * 4
    assert await pond.count("step", "name = 'bad' and state = 'failed' and tries = 1") == 4
    assert await pond.count("step", "seq is null") == 0
    assert await pond.count("step", "name = 'never'") == 0


async def test_an_end_that_is_refused_keeps_the_last_result(pond: Pond) -> None:
    await refuse(pond, "run", "new.outcome = 'succeeded' and new.flow = 'odd'")

    async def odd(ctx: Context, _: None) -> int:
        return await ctx.step("a", one)

    async def even(ctx: Context, _: None) -> int:
        return await ctx.step("a", one)

    flows = pond.flow(odd), pond.flow(even)
    async with pond.worker():
        runs = [await pond.submit(flow) for flow in [*flows, *flows]]
        rows = [await pond.ended(run) for run in runs]
    assert [row["outcome"] for row in rows] == ["failed", "succeeded"] * 2
    for run in runs:
        assert await stored(pond, run) == {"a": "done"}
        assert (await pond.kinds(run)).count("step.succeeded") == 1


async def test_a_time_limit_of_the_flow_while_a_result_is_stored_loses_nothing(pond: Pond) -> None:
    locked, cut = asyncio.Event(), asyncio.Event()

    async def hasty(ctx: Context, _: None) -> str:
        await ctx.step("a", one)
        try:
            async with asyncio.timeout(0.2):
                await ctx.step("b", one)
        except TimeoutError:
            cut.set()
        await ctx.step("c", one)
        return "done"

    async def hold(run_id: uuid.UUID) -> None:
        async with pond.engine_db.duty("test") as con:
            await con.execute("select from item where run_id = $1 for update", run_id)
            locked.set()
            await cut.wait()

    started = asyncio.Event()
    go = asyncio.Event()

    async def first(ctx: Context, _: None) -> str:
        started.set()
        await go.wait()
        return await hasty(ctx, None)

    flow = pond.flow(first)
    async with pond.worker(lease_s=20.0), asyncio.timeout(DEADLINE_S):
        run = await pond.submit(flow)
        await started.wait()
        holding = asyncio.create_task(hold(run))
        await locked.wait()
        go.set()
        row = await pond.ended(run)
        await holding
    assert row["output"] == "done"
    assert await stored(pond, run) == {"a": "done", "c": "done"}
    assert (await pond.kinds(run)).count("step.succeeded") == 2


async def test_endings_are_stored_before_the_end(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    monkeypatch.setattr(Recorder, "hold", lambda self, plan, write: held.append(plan.name))

    async def undo(ctx: Context, result: Any) -> None:
        pass

    undoing = pond.step(undo)

    async def undone(ctx: Context, _: None) -> None:
        await ctx.step("a", one, undo=undoing)
        raise Permanent("no")

    async def cleanup(ctx: Context, *given: Any) -> None:
        await ctx.step("cleanup", one)

    async def cleaned(ctx: Context, _: None) -> None:
        raise Permanent("no")

    flows = pond.flow(undone), pond.flow(cleaned, on_failure=cleanup)
    async with pond.worker():
        runs = [await pond.submit(flow) for flow in flows]
        for run in runs:
            await pond.ended(run)
    assert held == []
    assert (await stored(pond, runs[0]))["undo"] == "done"
    assert (await stored(pond, runs[1]))["cleanup"] == "done"


async def test_a_fork_that_a_time_limit_cuts_short_is_counted(pond: Pond) -> None:
    started, locked, cut = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def forks(ctx: Context, _: None) -> list[Any]:
        started.set()
        await locked.wait()
        await ctx.step("a", one)
        try:
            async with asyncio.timeout(0.2):
                await ctx.parallel(ctx.step("q", one, "first"))
        except TimeoutError:
            cut.set()
        found = [*(await ctx.parallel(ctx.step("q", one, "second")))]
        await ctx.sleep(1.1)
        return found

    async def hold(run_id: uuid.UUID) -> None:
        async with pond.engine_db.duty("test") as con:
            await con.execute("select from item where run_id = $1 for update", run_id)
            locked.set()
            await cut.wait()

    flow = pond.flow(forks)
    async with pond.worker(lease_s=20.0), asyncio.timeout(DEADLINE_S):
        run = await pond.submit(flow)
        await started.wait()
        await hold(run)
        row = await pond.ended(run)
    assert row["output"] == ["second"]
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select step_key, output #>> '{}' from step where run_id = $1 and name = 'q'", run
        )
    # The next attempt, which no limit cuts short, had the first one executed in its place.
    assert dict(rows) == {"~0.0/q:0": "first", "~1.0/q:0": "second"}


async def test_events_told_without_waiting_in_the_last_step_are_stored(pond: Pond) -> None:
    async def tells(ctx: Any) -> None:
        for n in range(5):
            ctx.emit_soon("half", {"n": n})

    telling = pond.step(tells)

    async def last(ctx: Context, _: None) -> None:
        await ctx.step(telling)

    flow = pond.flow(last)
    async with pond.worker():
        runs = [await pond.submit(flow) for _ in range(3)]
        for run in runs:
            await pond.ended(run)
    for run in runs:
        kinds = await pond.kinds(run)
        assert kinds[-1] == "run.succeeded"
        assert kinds.count("progress") == 5


async def test_a_refused_result_keeps_a_run_from_going_on_as_another(pond: Pond) -> None:
    await refuse(pond, "step", "new.name = 'bad' and new.state = 'done'")

    async def again(ctx: Context, n: int) -> int:
        if n == 0:
            await ctx.step("bad", one)
            await ctx.continue_as(1)
        return n

    flow = pond.flow(again)
    async with pond.worker():
        row = await pond.ended(await pond.submit(flow, 0))
    assert row["outcome"] == "failed"
    assert row["error"]["step"] == "bad"
    assert await pond.count("run") == 1


async def test_a_cancel_after_a_result_keeps_it(pond: Pond) -> None:
    async def cancelled(ctx: Context, _: None) -> None:
        await ctx.step("a", one)
        ctx.unwind("cancelled")
        await ctx.step("b", one)

    flow = pond.flow(cancelled)
    async with pond.worker():
        run = await pond.submit(flow)
        row = await pond.ended(run)
    assert row["outcome"] == "cancelled"
    assert await stored(pond, run) == {"a": "done"}


async def test_an_end_whose_answer_was_lost_is_found_with_its_last_result(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    ended: list[asyncio.Future[None]] = []
    statement, duty, finish = pond.engine_db.statement, pond.engine_db.duty, Committer.finish

    def losing(begin: Any) -> Any:
        @asynccontextmanager
        async def broken(name: str, **options: Any) -> AsyncIterator[Any]:
            async with begin(name, **options) as con:
                yield con
            if name in lost:
                lost.remove(name)
                raise Unavailable("the connection broke after the commit")

        return broken

    def noted(self: Committer, write: FinishWrite) -> asyncio.Future[None]:
        ended.append(finish(self, write))
        return ended[-1]

    monkeypatch.setattr(pond.engine_db, "statement", losing(statement))
    monkeypatch.setattr(pond.engine_db, "duty", losing(duty))
    monkeypatch.setattr(Committer, "finish", noted)

    async def plain(ctx: Context, _: None) -> int:
        lost.append("finish")
        return await ctx.step("a", one, 7)

    async def below(ctx: Context, _: None) -> int:
        lost.append("end")
        return await ctx.step("a", one, 8)

    async def above(ctx: Context, _: None) -> Any:
        return await ctx.join(await ctx.start("below", None))

    pond.flow(below)
    flows = pond.flow(plain), pond.flow(above)
    async with pond.worker():
        for flow, output in zip(flows, (7, 8), strict=True):
            run = await pond.submit(flow)
            assert (await pond.ended(run))["output"] == output
    assert lost == []
    assert [future.exception() for future in ended] == [None] * 3
    assert await pond.count("step", "name = 'a' and state = 'done'") == 2
    assert await pond.count("event", "kind = 'step.succeeded'") == 2
    assert await pond.count("event", "kind = 'run.succeeded'") == 3


async def test_a_result_that_can_be_stored_neither_as_done_nor_as_failed_fails_the_run(
    pond: Pond,
) -> None:
    await refuse(pond, "step", "new.name = 'bad'")

    async def stubborn(ctx: Context, _: None) -> str:
        await ctx.step("bad", one)
        try:
            await ctx.step("next", one)
        except Exception:
            await ctx.step("after", one)
        return "done"

    async def short(ctx: Context, _: None) -> int:
        return await ctx.step("bad", one)

    flows = pond.flow(stubborn), pond.flow(short)
    async with pond.worker():
        runs = [await pond.submit(flow) for flow in flows]
        rows = [await pond.ended(run) for run in runs]
    assert [row["outcome"] for row in rows] == ["failed", "failed"]
    assert await pond.count("step") == 0


@pytest.mark.parametrize("place", ["loop", "thread"])
async def test_the_outcome_of_a_once_step_waits_for_no_events(pond: Pond, place: str) -> None:
    started, locked = asyncio.Event(), asyncio.Event()

    async def on_the_loop(ctx: Any) -> int:
        started.set()
        await locked.wait()
        ctx.emit_soon("half")
        return 1

    loop, may_go = asyncio.get_running_loop(), threading.Event()

    def in_a_thread(ctx: Any) -> int:
        loop.call_soon_threadsafe(started.set)
        may_go.wait(DEADLINE_S)
        ctx.emit_soon("half")
        return 1

    function = on_the_loop if place == "loop" else in_a_thread
    step = pond.step(function, name="irreversible", effect="once", timeout_s=5.0)

    async def hasty(ctx: Context, _: None) -> str:
        try:
            async with asyncio.timeout(3.0):
                await ctx.step(step)
        except TimeoutError:
            pass
        await ctx.step("after", one)
        return "done"

    async def hold(run_id: uuid.UUID) -> None:
        con = await asyncpg.connect(pond.urls.engine)
        try:
            async with con.transaction():
                await con.execute("select from millpond.item where run_id = $1 for update", run_id)
                locked.set()
                may_go.set()
                # Longer than the step's time limit and the flow's, and not silent: such a session would be ended.
                await con.execute("select pg_sleep(6)")
        finally:
            await con.close()

    flow = pond.flow(hasty)
    async with pond.worker(lease_s=20.0), asyncio.timeout(DEADLINE_S):
        run = await pond.submit(flow)
        await started.wait()
        await hold(run)
        row = await pond.ended(run)
    assert row["output"] == "done"
    assert await stored(pond, run) == {"irreversible": "done", "after": "done"}
    assert (await pond.kinds(run)).count("progress") == 1
