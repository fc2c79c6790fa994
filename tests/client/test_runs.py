"""All that the client does with runs, on the real server: by the async client, and once by the sync one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from pydantic import BaseModel
from tests.api.conftest import Front
from tests.client.conftest import QUICK

from millpond.client import AsyncClient, AsyncRun, Client, Conflict, InvalidRequest, RunFailed
from millpond.engine import bulk
from millpond.engine.bulk import Operator
from millpond.engine.context import Context, StepContext
from millpond.engine.registry import step


class Order(BaseModel):
    """An input with a schema."""

    number: int
    note: str | None = None


def flows(front: Front) -> None:
    async def listen(ctx: Context, n: int) -> Any:
        return (await ctx.wait_event("go")).data

    async def add(ctx: Context, n: int) -> int:
        async def one() -> int:
            return n + 1

        return await ctx.step("one", one)

    async def echo(ctx: Context, given: Any) -> Any:
        return given

    async def order(ctx: Context, given: Order) -> int:
        return given.number

    for function in (listen, add, echo, order):
        front.flow(function)


@asynccontextmanager
async def working(front: Front) -> AsyncIterator[None]:
    """Run a worker with the flows above and the bulk flow."""
    flows(front)
    front.registry.add_flow(bulk.bulk)
    operator = Operator(db=front.db, hints=front.app.state.ports.hints)
    async with front.worker({Operator: operator}, default=10):
        yield


async def reach(run: AsyncRun, kind: str) -> None:
    """Follow a run until an event of a kind."""
    async with asyncio.timeout(20):
        async for event in run.events():
            if event.kind == kind:
                return
    raise AssertionError(f"the run ended without {kind}")


async def test_a_waiting_run_is_told_and_says_why_it_waits(front: Front, pond: AsyncClient) -> None:
    async with working(front):
        run = await pond.runs.start("listen", 1)
        await reach(run, "run.waiting")
        why = await run.why()
        assert (why.state, why.reasons[0].kind) == ("waiting", "signal")
        assert (await pond.runs.why(run.id)).text == why.text
        assert why.reasons[0].facts["name"] == "go"
        signal = await run.signal("go", {"pages": 3})
        assert (signal.run_id, signal.name) == (run.id, "go")
        assert await run.result(timeout_s=20) == {"pages": 3}
        with pytest.raises(Conflict):
            await pond.runs.signal(run.id, "go")


async def test_one_key_sends_one_signal(front: Front, pond: AsyncClient) -> None:
    await front.publish()
    run = await pond.runs.start("echo")
    first = await run.signal("go", 1, idempotency_key="k")
    assert (await run.signal("go", 1, idempotency_key="k")).id == first.id
    assert (await run.signal("go", 1)).id != first.id
    page = await pond.runs.event_page(run.id, after=1)
    assert [event.kind for event in page.data] == ["signal.received", "signal.received"]


async def test_a_run_is_done_again_from_a_step_with_another_input(
    front: Front, pond: AsyncClient
) -> None:
    async with working(front):
        run = await pond.runs.start("add", 1)
        assert await run.result(timeout_s=20) == 2
        again = await run.rerun(from_step="one:0", input=5)
        assert await again.result(timeout_s=20) == 6
        assert (again.data.rerun_of, again.data.rerun_from) == (run.id, "one:0")
        same = await pond.runs.rerun(run.id)
        assert await same.result(timeout_s=20) == 2
        assert (await run.refresh()).data.reruns == [same.id, again.id]
        assert [step.key for step in run.data.steps] == ["one:0"]


async def test_null_is_an_input_and_left_out_is_none_given(front: Front, pond: AsyncClient) -> None:
    await front.publish()
    left_out = await pond.runs.start("echo")
    assert (await left_out.refresh()).data.input == {}
    null = await pond.runs.start("echo", None)
    assert (await null.refresh()).data.input is None
    model = await pond.runs.start("echo", Order(number=7))
    assert (await model.refresh()).data.input == {"number": 7, "note": None}
    again = await model.rerun(input=None)
    assert (await again.refresh()).data.input is None


async def test_one_run_per_key_is_refused_joined_or_replaced(
    front: Front, pond: AsyncClient
) -> None:
    await front.publish()
    first = await pond.runs.start("echo", 1, dedup_key="order-17", deadline_s=3600)
    assert (first.data.is_new, (await first.refresh()).data.dedup_key) == (True, "order-17")
    assert first.data.deadline_at is not None
    with pytest.raises(Conflict) as caught:
        await pond.runs.start("echo", 2, dedup_key="order-17")
    assert caught.value.code == "duplicate_run"
    assert caught.value.problem["run_id"] == str(first.id)
    joined = await pond.runs.start("echo", 2, dedup_key="order-17", on_duplicate="join")
    assert (joined.id, joined.data.is_new) == (first.id, False)
    newer = await pond.runs.start("echo", 2, dedup_key="order-17", on_duplicate="cancel_old")
    assert newer.data.is_new
    assert (await first.refresh()).state == "cancelled"


async def test_many_are_started_all_or_none(front: Front, pond: AsyncClient) -> None:
    async with working(front):
        batch = await pond.runs.start_many(
            [{"flow": "add", "input": n, "labels": {"n": str(n)}} for n in range(5)]
        )
        runs = [await pond.runs.get(run_id) for run_id in batch.ids]
        assert [await run.result(timeout_s=20) for run in runs] == [1, 2, 3, 4, 5]
        assert batch.joined == []
        with pytest.raises(InvalidRequest) as caught:
            await pond.runs.start_many([{"flow": "add", "input": 1}, {"flow": "nothing"}])
        assert "runs[1].flow" in str(caught.value.problem["errors"])
        found = [run async for run in pond.runs.list(flow="add", state=["succeeded", "queued"])]
        assert len(found) == 5


async def test_many_are_counted_then_cancelled(front: Front, pond: AsyncClient) -> None:
    async with working(front):
        runs = [await pond.runs.start("listen", n, labels={"batch": "7"}) for n in range(3)]
        other = await pond.runs.start("listen", 9)
        for run in runs:
            await reach(run, "run.waiting")
        told = await pond.runs.bulk_dry_run("cancel", labels={"batch": "7"}, states="waiting")
        assert (told.matched, told.is_exact) == (3, True)
        assert {run.id for run in told.examples} == {run.id for run in runs}
        acting = await pond.runs.bulk("cancel", labels={"batch": "7"}, reason="wrong data")
        counts = await acting.result(timeout_s=20)
        assert (counts["matched"], counts["done"]) == (3, 3)
        assert {(await run.refresh()).state for run in runs} == {"cancelled"}
        assert not (await other.refresh()).data.is_final


async def test_a_cancel_can_skip_the_endings(front: Front, pond: AsyncClient) -> None:
    undone: list[int] = []

    @step("give_back", registry=front.registry)
    async def give_back(step_ctx: StepContext, n: int) -> None:
        undone.append(n)

    async def taking(ctx: Context, n: int) -> None:
        async def take() -> int:
            return n

        await ctx.step("take", take, undo=give_back)
        await ctx.wait_event("go")

    front.flow(taking)
    async with front.worker():
        run, other = await pond.runs.start("taking", 1), await pond.runs.start("taking", 2)
        for one in (run, other):
            await reach(one, "run.waiting")
        assert (await run.cancel("not wanted", skip_endings=True)).state == "cancelled"
        stopped = await pond.runs.cancel(other.id, "not wanted")
        assert (await stopped.wait(timeout_s=20)).state == "cancelled"
    assert undone == [2]


async def test_a_blocked_run_is_resumed(front: Front, pond: AsyncClient) -> None:
    async def one() -> int:
        return 1

    def register(name: str) -> None:
        async def changing(ctx: Context, _: Any) -> str:
            await ctx.step(name, one)
            await ctx.wait_event("go")
            return "done"

        front.registry.flows.clear()
        front.flow(changing)

    register("first")
    async with front.worker():
        run = await pond.runs.start("changing")
        await reach(run, "run.waiting")
    register("second")
    async with front.worker():
        await run.signal("go")
        await reach(run, "run.blocked")
        assert (await run.refresh()).data.blocked is not None
        assert (await run.why()).reasons[0].kind == "blocked"
    register("first")
    async with front.worker():
        assert (await run.resume()).data.blocked is None
        assert await run.result(timeout_s=20) == "done"
        with pytest.raises(Conflict, match="not blocked"):
            await pond.runs.resume(run.id)


async def test_a_poisoned_run_is_released(front: Front, pond: AsyncClient, admin_url: str) -> None:
    async with working(front):
        run = await pond.runs.start("add", 1)
        await run.wait(timeout_s=20)
        with pytest.raises(Conflict):
            await run.release()
        await _poison(admin_url, run.id)
        with pytest.raises(RunFailed, match="poison"):
            await run.result()
        released = await run.release("more memory", idempotency_key="k")
        again = await pond.runs.release(run.id, "more memory", idempotency_key="k")
    assert again.id == released.id
    assert (await released.refresh()).data.rerun_of == run.id


async def _poison(admin_url: str, run_id: uuid.UUID) -> None:
    admin = await asyncpg.connect(admin_url)
    await admin.execute(
        "update millpond.run set outcome = 'failed', output = null, "
        """error = '{"class": "Poison", "code": "poison"}' where run_id = $1""",
        run_id,
    )
    await admin.close()


async def test_the_sync_client_tells_repeats_and_asks_why(front: Front) -> None:
    def use() -> list[Any]:
        with Client(front.url, token=front.token(), patience=QUICK) as pond:
            run = pond.runs.start("listen", 1)
            run.signal("go", "first")
            first = run.result(timeout_s=20)
            again = run.rerun(input=2)
            pond.runs.signal(again.id, "go", "second")
            second = again.result(timeout_s=20)
            batch = pond.runs.start_many([{"flow": "add", "input": 1}])
            last = pond.runs.get(batch.ids[0]).result(timeout_s=20)
            return [first, second, last, again.why().reasons[0].kind]

    async with working(front):
        assert await asyncio.to_thread(use) == ["first", "second", 2, "finished"]
