"""Replay with a check: code that asks for something else than was recorded stops, and can be resumed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine import blocking, executor, views
from millpond.engine.blocking import resume
from millpond.engine.context import Context, StepContext
from millpond.engine.operations import cancel
from millpond.engine.registry import Registry, step
from millpond.engine.waits import Readied
from millpond.errors import Conflict, NotFound
from millpond.types import RunState

Body = Callable[[Context], Awaitable[Any]]


async def _one() -> int:
    return 1


async def _first(ctx: Context) -> None:
    await ctx.step("first", _one)


async def _second(ctx: Context) -> None:
    await ctx.step("second", _one)


async def _sleep(ctx: Context) -> None:
    await ctx.sleep(1.1)


async def _emit(ctx: Context) -> None:
    await ctx.emit("sleep")


async def _both(ctx: Context) -> None:
    await ctx.parallel(_first(ctx), _second(ctx))


async def _both_swapped(ctx: Context) -> None:
    await ctx.parallel(_second(ctx), _first(ctx))


def _register(pond: Pond, *calls: Body) -> None:
    """Register the flow `changing` anew, as a sequence of calls."""

    async def changing(ctx: Context, _: None) -> str:
        for call in calls:
            await call(ctx)
        return "done"

    pond.registry = Registry()
    pond.flow(changing)


async def _recorded(pond: Pond, *calls: Body, until: str = "run.waiting") -> uuid.UUID:
    """Run the flow as these calls, up to its first wait."""
    _register(pond, *calls)
    async with pond.worker():
        run_id = await pond.submit("changing")
        await pond.until(run_id, until)
    return run_id


async def _shown(pond: Pond, run_id: uuid.UUID) -> views.RunView:
    async with pond.db.org(pond.org_id) as con:
        return await views.get_run(con, pond.org_id, run_id)


async def _resume(pond: Pond, run_id: uuid.UUID) -> None:
    async with pond.db.org(pond.org_id) as con:
        readied = await resume(con, pond.org_id, run_id, "user:test")
    pond.hints.wake({one.queue for one in readied})


@pytest.mark.parametrize(
    ("changed", "asked", "recorded", "place"),
    [
        ((_second, _sleep), "second:0", "first:0", 0),
        ((_sleep, _first), "sleep:0", "first:0", 0),
        ((_second, _first, _sleep), "second:0", "first:0", 0),
        ((_first, _first, _sleep), "first:1", "sleep:0", 1),
    ],
    ids=["renamed", "reordered", "inserted", "repeated"],
)
async def test_changed_code_stops_the_run_which_stays_recoverable(
    pond: Pond, changed: tuple[Body, ...], asked: str, recorded: str, place: int
) -> None:
    run_id = await _recorded(pond, _first, _sleep)
    _register(pond, *changed)
    async with pond.worker():
        event = await pond.until(run_id, "run.blocked")
    shown = await _shown(pond, run_id)
    assert shown.state == RunState.WAITING
    assert shown.blocked is not None
    assert event.data["code"] == "history_mismatch"
    assert (event.data["asked"], event.data["recorded"]) == (asked, recorded)
    assert (event.data["branch"], event.data["place"]) == ("", place)
    assert await pond.count("lease") == 0
    assert await pond.count("step", "step_key = 'second:0'") == 0
    _register(pond, _first, _sleep)
    async with pond.worker():
        await _resume(pond, run_id)
        row = await pond.ended(run_id)
    assert row["output"] == "done"
    assert (await pond.kinds(run_id)).count("run.unblocked") == 1


async def test_another_kind_of_step_at_a_key_is_a_mismatch(pond: Pond) -> None:
    async def work(ctx: Context) -> None:
        await ctx.step("sleep", _one)

    run_id = await _recorded(pond, _sleep)
    _register(pond, work)
    async with pond.worker():
        event = await pond.until(run_id, "run.blocked")
    assert (event.data["asked_kind"], event.data["recorded_kind"]) == ("step", "sleep")


async def test_branches_are_compared_each_by_itself(pond: Pond) -> None:
    run_id = await _recorded(pond, _both, _sleep)
    _register(pond, _both_swapped, _sleep)
    async with pond.worker():
        event = await pond.until(run_id, "run.blocked")
    assert event.data["branch"] in ("~0.0/", "~0.1/")
    assert event.data["place"] == 0


async def test_a_blocked_run_is_not_woken_by_its_timers(pond: Pond) -> None:
    run_id = await _recorded(pond, _first, _sleep)
    _register(pond, _second, _sleep)
    async with pond.worker():
        await pond.until(run_id, "run.blocked")
        await pond.until(run_id, "sleep.ended")
        other = await pond.submit("changing")  # a run after it: the timer had its chance
        await pond.ended(other)
    assert (await _shown(pond, run_id)).blocked is not None
    assert (await pond.kinds(run_id)).count("run.blocked") == 1


async def test_a_time_limit_of_the_flow_leaves_a_place_without_record(pond: Pond) -> None:
    async def limited(ctx: Context) -> None:
        try:
            async with asyncio.timeout(0.2):
                await ctx.step("never", asyncio.Event().wait)
        except TimeoutError:
            await ctx.step("instead", _one)

    run_id = await _recorded(pond, limited, _sleep)
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == "done"
    assert "run.blocked" not in await pond.kinds(run_id)


async def test_records_without_a_place_are_not_compared_by_place(pond: Pond) -> None:
    run_id = await _recorded(pond, _first, _sleep)
    async with pond.engine_db.duty("test") as con:
        await con.execute("update step set seq = null")
    _register(pond, _second, _first, _sleep)
    async with pond.worker():
        row = await pond.ended(run_id)
    assert row["output"] == "done"


async def test_a_blocked_run_can_be_cancelled_and_only_a_blocked_one_resumed(pond: Pond) -> None:
    run_id = await _recorded(pond, _first, _sleep)
    with pytest.raises(Conflict, match="not blocked"):
        await _resume(pond, run_id)
    with pytest.raises(NotFound):
        await _resume(pond, uuid.uuid4())
    _register(pond, _second)
    async with pond.worker():
        await pond.until(run_id, "run.blocked")
        async with pond.db.org(pond.org_id) as con:
            assert await cancel(con, pond.org_id, run_id, "user:test") == RunState.CANCELLED
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
        with pytest.raises(Conflict, match="not blocked"):
            await _resume(pond, run_id)
    assert await pond.count("timer") == 0


class _Held:
    """A run whose code does not match, held at the moment before it is blocked."""

    def __init__(self, pond: Pond, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_there, self.may_go = asyncio.Event(), asyncio.Event()
        block = blocking.block

        async def held(*given: Any, **options: Any) -> list[Readied]:
            self.is_there.set()
            await self.may_go.wait()
            return await block(*given, **options)

        monkeypatch.setattr(executor, "block", held)


async def _cancel(pond: Pond, run_id: uuid.UUID) -> None:
    async with pond.db.org(pond.org_id) as con:
        await cancel(con, pond.org_id, run_id, "user:test")
    pond.hints.wake(["default"])


async def _overdue(pond: Pond, run_id: uuid.UUID) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into timer (org_id, run_id, step_key, kind, due_at) "
            "values ($1, $2, '!deadline', 'deadline', clock_timestamp())",
            pond.org_id,
            run_id,
        )


async def test_a_cancel_that_comes_just_before_a_run_is_blocked_is_heeded(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await _recorded(pond, _first, _sleep)
    _register(pond, _second)
    held = _Held(pond, monkeypatch)
    async with pond.worker():
        await asyncio.wait_for(held.is_there.wait(), DEADLINE_S)
        await _cancel(pond, run_id)
        held.may_go.set()
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    assert "run.blocked" not in await pond.kinds(run_id)


def _register_undone(pond: Pond, *names: str) -> None:
    """Register the flow `changing` as steps that are undone, up to a wait."""
    pond.registry = Registry()

    @step("unbook", registry=pond.registry)
    async def unbook(step_ctx: StepContext, number: int) -> None:
        return None

    async def changing(ctx: Context, _: None) -> None:
        for name in names:
            await ctx.step(name, _one, undo=unbook)
        await ctx.sleep(1.1)

    pond.flow(changing)


async def test_a_deadline_sets_a_blocked_run_going_to_its_endings(pond: Pond) -> None:
    _register_undone(pond, "first")
    async with pond.worker():
        run_id = await pond.submit("changing")
        await pond.until(run_id, "run.waiting")
    _register_undone(pond, "second")
    async with pond.worker():
        await pond.until(run_id, "run.blocked")
    _register_undone(pond, "first")
    async with pond.worker():
        await _overdue(pond, run_id)
        row = await pond.ended(run_id)
    assert (row["outcome"], row["error"]["code"]) == ("failed", "deadline_exceeded")


async def test_a_run_blocked_at_its_endings_goes_on_when_it_is_cancelled_again(pond: Pond) -> None:
    _register_undone(pond, "first")
    async with pond.worker():
        run_id = await pond.submit("changing")
        await pond.until(run_id, "run.waiting")
    _register_undone(pond, "second")
    async with pond.worker():
        await _cancel(pond, run_id)
        await pond.until(run_id, "run.blocked")
    _register_undone(pond, "first")
    async with pond.worker():
        await _cancel(pond, run_id)
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    assert (await pond.kinds(run_id)).count("run.cancel_requested") == 1
