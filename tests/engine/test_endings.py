"""Endings that must happen: undos in reverse order, on_failure, after failures, cancels and crashes."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.test_faults import worker_process

from millpond.engine import endgame, history
from millpond.engine.blocking import resume
from millpond.engine.context import Context, StepContext
from millpond.engine.endgame import Failure
from millpond.engine.operations import cancel
from millpond.engine.registry import Registry, Step, step
from millpond.errors import NotDone, Permanent, Transient
from millpond.retry import NO_RETRY, Retry
from millpond.types import RunState

QUICK = Retry(max_tries=3, base_s=0.01, cap_s=0.02)


class Trip:
    """A flow that books things one after the other, each with its undo, and the log of both."""

    def __init__(self, pond: Pond, **options: Any) -> None:
        self.pond = pond
        self.log: list[str] = []
        self.undo_errors: dict[str, list[Exception]] = {}
        self.hold = asyncio.Event()
        self.is_held = asyncio.Event()
        self.book, self.unbook = self._steps()
        pond.registry = Registry()
        pond.flow(self.trip, name="trip", **options)

    def _steps(self) -> tuple[Step[Any, str], Step[Any, None]]:
        @step("book", registry=Registry())
        async def book(step_ctx: StepContext, what: str) -> str:
            self.log.append(f"book {what}")
            return what

        @step("unbook", retry=QUICK, registry=Registry())
        async def unbook(step_ctx: StepContext, what: str) -> None:
            self.log.append(f"unbook {what}")
            errors = self.undo_errors.get(what, [])
            if errors:
                raise errors.pop(0)

        return book, unbook

    async def trip(self, ctx: Context, ending: str) -> str:
        """Book a flight and, side by side, a car and a hotel; then end as told."""

        async def late_hotel() -> None:
            await ctx.step(self.book, "car", undo=self.unbook)

        async def hotel() -> None:
            await ctx.step(self.book, "hotel", undo=self.unbook)
            await ctx.step(self.book, "breakfast")

        await ctx.step(self.book, "flight", undo=self.unbook)
        await late_hotel()
        await ctx.parallel(hotel())
        if ending == "fail":
            await ctx.step("refuse", _refuse)
        if ending == "raise":
            raise Permanent("no more", code="no_more")
        if ending == "wait":
            await ctx.sleep(1000)
        if ending == "hold":
            self.is_held.set()
            await self.hold.wait()
        return "done"


async def _refuse() -> None:
    raise Permanent("the card was refused", code="refused")


ALL = ["book flight", "book car", "book hotel", "book breakfast"]
UNDONE = ["unbook hotel", "unbook car", "unbook flight"]


async def _cancel(pond: Pond, run_id: uuid.UUID, **options: Any) -> RunState:
    async with pond.db.org(pond.org_id) as con:
        state = await cancel(con, pond.org_id, run_id, "user:test", **options)
    pond.hints.cancelled([run_id])
    pond.hints.wake(["default"])
    return state


async def _nothing_is_left(pond: Pond) -> None:
    for table in ("item", "ready", "lease", "timer"):
        assert await pond.count(table) == 0


@pytest.mark.parametrize("ending", ["fail", "raise"])
async def test_a_failed_run_undoes_its_steps_in_reverse_order(pond: Pond, ending: str) -> None:
    trip = Trip(pond)
    async with pond.worker():
        run_id = await pond.submit("trip", ending)
        row = await pond.ended(run_id)
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == {"fail": "refused", "raise": "no_more"}[ending]
    assert trip.log == ALL + UNDONE
    events = await pond.events(run_id)
    told = [one.step_key for one in events if (one.step_key or "").startswith("!undo/")]
    assert told == [
        "!undo/~0.0/book:0/unbook:0",
        "!undo/book:1/unbook:0",
        "!undo/book:0/unbook:0",
    ]
    (ended,) = [one for one in events if one.kind == "run.ending"]
    assert ended.data["outcome"] == "failed"
    await _nothing_is_left(pond)


async def test_a_run_that_succeeds_undoes_nothing(pond: Pond) -> None:
    trip = Trip(pond)
    async with pond.worker():
        row = await pond.ended(await pond.submit("trip", "succeed"))
    assert row["output"] == "done"
    assert trip.log == ALL
    await _nothing_is_left(pond)


@pytest.mark.parametrize("where", ["running", "waiting", "queued"])
async def test_a_cancelled_run_undoes_its_steps_wherever_it_stands(pond: Pond, where: str) -> None:
    trip = Trip(pond)
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("trip", "wait" if where == "waiting" else "hold")
        if where == "running":
            await asyncio.wait_for(trip.is_held.wait(), DEADLINE_S)
            assert await _cancel(pond, run_id) == RunState.RUNNING
            await pond.ended(run_id)
        elif where == "waiting":
            await pond.until(run_id, "run.waiting")
        else:
            await asyncio.wait_for(trip.is_held.wait(), DEADLINE_S)
    if where != "running":
        assert trip.log == ALL
        assert await _cancel(pond, run_id) == RunState.QUEUED
        assert await _cancel(pond, run_id) == RunState.QUEUED
        assert await pond.count("item", "state = 'queued' and cancel_requested") == 1
        async with pond.worker():
            await pond.ended(run_id)
    assert (await pond.run_row(run_id))["outcome"] == "cancelled"
    assert trip.log == ALL + UNDONE
    assert (await pond.kinds(run_id)).count("run.cancel_requested") == 1
    await _nothing_is_left(pond)


async def test_a_run_that_never_began_ends_at_once(pond: Pond) -> None:
    calls: list[str] = []

    async def after(ctx: Context, value: str, failure: Failure) -> None:
        calls.append(failure.outcome)

    Trip(pond, on_failure=after)
    run_id = await pond.submit("trip", "wait")
    assert await _cancel(pond, run_id) == RunState.CANCELLED
    assert calls == []


async def test_a_failed_undo_is_tried_again_then_told_and_the_others_still_run(pond: Pond) -> None:
    trip = Trip(pond)
    trip.undo_errors = {"hotel": [Transient("busy")], "car": [Permanent("too late")]}
    async with pond.worker():
        run_id = await pond.submit("trip", "fail")
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "refused"
    assert trip.log == [
        *ALL,
        "unbook hotel",
        "unbook hotel",
        "unbook car",
        "unbook flight",
    ]
    (failed,) = [
        one
        for one in await pond.events(run_id)
        if one.kind == "step.failed" and one.step_key != "refuse:0"
    ]
    assert failed.step_key == "!undo/book:1/unbook:0"


async def test_an_undo_with_a_long_backoff_waits_without_a_slot_and_no_cancel_ends_it(
    pond: Pond,
) -> None:
    trip = Trip(pond)
    trip.undo_errors = {"hotel": [Transient("busy", retry_after_s=1.2)]}
    async with pond.worker():
        run_id = await pond.submit("trip", "wait")
        await pond.until(run_id, "run.waiting")
        await _cancel(pond, run_id)
        await pond.until(run_id, "run.waiting", nth=2)
        await _cancel(pond, run_id)
        row = await pond.ended(run_id)
    assert row["outcome"] == "cancelled"
    assert trip.log == [*ALL, "unbook hotel", *UNDONE]


async def test_on_failure_runs_after_the_undos_and_knows_how_the_run_ends(pond: Pond) -> None:
    seen: list[Any] = []

    async def after(ctx: Context, ending: str, failure: Failure) -> None:
        async def tell(what: str) -> str:
            trip.log.append(what)
            return what

        await ctx.step("tell", tell, f"sorry for {ending}")
        await ctx.emit("told")
        seen.append(failure)

    trip = Trip(pond, on_failure=after)
    async with pond.worker():
        failed = await pond.submit("trip", "fail")
        assert (await pond.ended(failed))["outcome"] == "failed"
        assert trip.log == [*ALL, *UNDONE, "sorry for fail"]
        assert (seen[0].outcome, seen[0].error["code"]) == ("failed", "refused")
        cancelled = await pond.submit("trip", "wait")
        await pond.until(cancelled, "run.waiting")
        await _cancel(pond, cancelled)
        assert (await pond.ended(cancelled))["outcome"] == "cancelled"
    assert seen[1] == Failure(outcome="cancelled")
    assert "!failure/tell:0" in {one.step_key for one in await pond.events(failed)}
    await _nothing_is_left(pond)


async def test_on_failure_may_wait_and_is_shielded_from_cancel(pond: Pond) -> None:
    ended = 0

    async def after(ctx: Context, _: str, failure: Failure) -> None:
        nonlocal ended
        await ctx.sleep(1.2)
        ended += 1

    Trip(pond, on_failure=after)
    async with pond.worker():
        run_id = await pond.submit("trip", "fail")
        await pond.until(run_id, "run.waiting")
        assert await _cancel(pond, run_id) == RunState.QUEUED
        row = await pond.ended(run_id)
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "refused"
    assert ended == 1


async def test_an_on_failure_that_raises_is_told_and_changes_no_outcome(pond: Pond) -> None:
    async def after(ctx: Context, _: str, failure: Failure) -> None:
        raise Permanent("also this", code="also_this")

    Trip(pond, on_failure=after)
    async with pond.worker():
        run_id = await pond.submit("trip", "fail")
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "refused"
    (told,) = [one for one in await pond.events(run_id) if one.kind == "run.ending_failed"]
    assert told.data["error"]["code"] == "also_this"


async def test_a_run_over_its_time_is_undone_too(pond: Pond) -> None:
    trip = Trip(pond, timeout_s=0.5)
    async with pond.worker():
        row = await pond.ended(await pond.submit("trip", "hold"))
    assert row["error"]["code"] == "timeout"
    assert trip.log == ALL + UNDONE


async def test_a_record_still_on_its_way_when_the_run_ends_is_undone_too(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    trip = Trip(pond)
    entered, gate, left, looked = (asyncio.Event() for _ in range(4))

    async def look(*given: Any) -> Any:
        if given[1]:  # a claim looks too, mostly for nothing
            looked.set()
        return await load(*given)

    load = history.load
    monkeypatch.setattr(history, "load", look)

    async def slow(what: str) -> str:
        entered.set()
        await gate.wait()
        return what

    async def late(ctx: Context, _: None) -> None:
        try:
            await ctx.step("slow", slow, "flight", undo=trip.unbook)
        finally:
            left.set()

    pond.flow(late, timeout_s=1.0)
    async with pond.worker():
        run_id = await pond.submit("late")
        await asyncio.wait_for(entered.wait(), DEADLINE_S)
        async with pond.engine_db.duty("test") as con:
            # Its record waits for this lock while the time of the run passes.
            await con.execute("select from item where item_id = $1 for update", run_id)
            gate.set()
            await asyncio.wait_for(left.wait(), DEADLINE_S)
            looked.clear()
            with pytest.raises(TimeoutError):  # it does not look for what to undo yet
                await asyncio.wait_for(looked.wait(), 0.5)
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "timeout"
    assert trip.log == ["unbook flight"]


async def test_undos_wait_for_the_outcome_of_a_once_step(pond: Pond) -> None:
    from tests.engine.test_once import _answer, _request

    log: list[str] = []

    @step("refund", registry=pond.registry)
    async def refund(step_ctx: StepContext, paid: int) -> None:
        log.append(f"refund {paid}")

    @step("pay", effect="once", registry=pond.registry)
    async def pay(step_ctx: StepContext) -> int:
        log.append("pay")
        raise ConnectionError("reset")

    async def shop(ctx: Context, _: None) -> None:
        await ctx.step(pay, undo=refund)

    pond.flow(shop)
    async with pond.worker():
        run_id = await pond.submit("shop")
        request = await _request(pond, run_id)
        await pond.until(run_id, "run.awaiting_input")
        await _cancel(pond, run_id)
        await pond.until(run_id, "run.awaiting_input", nth=2)
        assert log == ["pay"]
        await _answer(pond, request, {"outcome": "done", "output": 30})
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    assert log == ["pay", "refund 30"]


async def test_an_undo_may_itself_be_once(pond: Pond) -> None:
    calls = 0

    @step("unbook", effect="once", retry=QUICK, registry=pond.registry)
    async def unbook(step_ctx: StepContext, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise NotDone("not yet")

    async def trip(ctx: Context, _: None) -> None:
        await ctx.step("book", _book, undo=unbook)
        await ctx.step("refuse", _refuse, retry=NO_RETRY)

    pond.flow(trip)
    async with pond.worker():
        run_id = await pond.submit("trip")
        assert (await pond.ended(run_id))["outcome"] == "failed"
    assert calls == 2


async def _book() -> str:
    return "flight"


async def test_a_time_limit_that_passed_in_the_flow_passes_again_when_undos_are_sought(
    pond: Pond,
) -> None:
    trip = Trip(pond)

    async def limited(ctx: Context, _: None) -> None:
        try:
            async with asyncio.timeout(0.3):
                await ctx.parallel(
                    ctx.step(trip.book, "flight", undo=trip.unbook),
                    ctx.step("never", asyncio.Event().wait),
                )
        except TimeoutError:
            await ctx.step(trip.book, "train", undo=trip.unbook)
        await ctx.step("refuse", _refuse)

    pond.flow(limited)
    async with pond.worker():
        run_id = await pond.submit("limited")
        assert (await pond.ended(run_id))["outcome"] == "failed"
    assert trip.log == ["book flight", "book train", "unbook train", "unbook flight"]


async def test_endings_that_the_code_does_not_match_block_the_run_until_it_does(
    pond: Pond,
) -> None:
    trip = Trip(pond)
    async with pond.worker():
        run_id = await pond.submit("trip", "wait")
        await pond.until(run_id, "run.waiting")
    changed = Trip(pond)

    async def shorter(ctx: Context, ending: str) -> str:
        await ctx.step(changed.book, "flight", undo=changed.unbook)
        return "done"

    pond.registry = Registry()
    pond.flow(shorter, name="trip")
    async with pond.worker():
        await _cancel(pond, run_id)
        event = await pond.until(run_id, "run.blocked")
        assert event.data["recorded"] == "book:1"
        assert changed.log == []
        # Asked again, it tries again, and comes to the same.
        assert await _cancel(pond, run_id) == RunState.QUEUED
        await pond.until(run_id, "run.blocked", nth=2)
    right = Trip(pond)
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await resume(con, pond.org_id, run_id, "user:test")
        assert (await pond.ended(run_id))["outcome"] == "cancelled"
    assert (trip.log, right.log) == (ALL, UNDONE)


async def test_cancel_that_skips_endings_ends_a_run_whose_code_is_gone(pond: Pond) -> None:
    trip = Trip(pond)
    async with pond.worker():
        run_id = await pond.submit("trip", "wait")
        await pond.until(run_id, "run.waiting")
    assert await _cancel(pond, run_id) == RunState.QUEUED  # and no worker is there to take it up
    assert await _cancel(pond, run_id, skip_endings=True) == RunState.CANCELLED
    last = (await pond.events(run_id))[-1]
    assert (last.kind, last.data["endings"]) == ("run.cancelled", "skipped")
    assert trip.log == ALL
    await _nothing_is_left(pond)


async def test_endings_go_on_after_the_worker_was_killed_in_the_middle(
    pond: Pond, tmp_path: Path
) -> None:
    data = {"log": str(tmp_path / "log"), "gate": str(tmp_path / "gate")}
    log = tmp_path / "log"

    def lines() -> list[str]:
        return log.read_text().split() if log.exists() else []

    async with worker_process(pond) as first:
        run_id = await pond.submit("tests.undone", data)
        async with asyncio.timeout(DEADLINE_S):
            while "second" not in lines():  # the second undo is under way
                await asyncio.sleep(0.02)
        first.kill()
        await first.wait()
        (tmp_path / "gate").touch()
        async with worker_process(pond):
            row = await pond.ended(run_id)
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "refused"
    assert lines() == ["a", "b", "un-b", "second", "second", "un-a", "sorry"]
    assert (await pond.kinds(run_id)).count("run.ending") == 1


async def test_drain_in_the_middle_of_an_undo_hands_the_endings_on(pond: Pond) -> None:
    gate = asyncio.Event()
    entered = asyncio.Event()
    calls: list[str] = []

    @step("unbook", registry=pond.registry)
    async def unbook(step_ctx: StepContext, what: str) -> None:
        calls.append(what)
        entered.set()
        await gate.wait()

    async def trip(ctx: Context, _: None) -> None:
        await ctx.step("book", _book, undo=unbook)
        await ctx.step("refuse", _refuse)

    pond.flow(trip)
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("trip")
        await asyncio.wait_for(entered.wait(), DEADLINE_S)
    assert (await pond.kinds(run_id))[-1] == "run.released"
    gate.set()
    async with pond.worker():
        assert (await pond.ended(run_id))["outcome"] == "failed"
    assert calls == ["flight", "flight"]


async def test_an_input_that_on_failure_no_longer_takes_is_told_and_the_run_ends(
    pond: Pond,
) -> None:
    async def after(ctx: Context, _: Any, failure: Failure) -> None:
        raise AssertionError("there is no input for it")

    async def wide(ctx: Context, given: str) -> None:
        await ctx.sleep(1000)

    async def narrow(ctx: Context, given: int) -> None:
        await ctx.sleep(1000)

    pond.flow(wide, name="shrinks", on_failure=after)
    async with pond.worker():
        run_id = await pond.submit("shrinks", "seven")
        await pond.until(run_id, "run.waiting")
    pond.registry = Registry()
    pond.flow(narrow, name="shrinks", on_failure=after)
    async with pond.worker():
        assert await _cancel(pond, run_id) == RunState.QUEUED
        row = await pond.ended(run_id)
    assert row["outcome"] == "cancelled"
    (told,) = [one for one in await pond.events(run_id) if one.kind == "run.ending_failed"]
    assert told.data["error"]["code"] == "invalid_input"
    await _nothing_is_left(pond)


async def test_a_run_that_cannot_be_ended_stands_still_and_says_why(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> Failure:
        raise Permanent("the endings are out of order", code="out_of_order")

    trip = Trip(pond)
    with monkeypatch.context() as patched:
        patched.setattr(endgame, "perform", refuse)
        async with pond.worker():
            run_id = await pond.submit("trip", "fail")
            event = await pond.until(run_id, "run.blocked")
            assert event.data["code"] == "out_of_order"
            assert await pond.count("lease") == 0
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            readied = await resume(con, pond.org_id, run_id, "user:test")
        pond.hints.wake([one.queue for one in readied])
        assert (await pond.ended(run_id))["error"]["code"] == "refused"
    assert trip.log == ALL + UNDONE


async def test_an_ending_that_failed_is_told_once_however_often_endings_are_tried(
    pond: Pond,
) -> None:
    may_end, is_there = asyncio.Event(), asyncio.Event()

    async def after(ctx: Context, _: str, failure: Failure) -> None:
        is_there.set()
        await may_end.wait()
        raise Permanent("also this", code="also_this")

    trip = Trip(pond, on_failure=after)
    trip.undo_errors["car"] = [Permanent("no", code="no_undo")]
    async with pond.worker(drain_s=0.1):
        run_id = await pond.submit("trip", "fail")
        await asyncio.wait_for(is_there.wait(), DEADLINE_S)
    may_end.set()
    async with pond.worker():
        assert (await pond.ended(run_id))["error"]["code"] == "refused"
    told = [one for one in await pond.events(run_id) if one.kind == "run.ending_failed"]
    assert [one.data["error"]["code"] for one in told] == ["StepFailed", "also_this"]
