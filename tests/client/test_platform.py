"""Flows, queues, pauses, workers and knowledge by the client, on the real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.api.conftest import ALL, Front
from tests.client.conftest import QUICK

from millpond.client import AsyncClient, Client, Forbidden, NotFound
from millpond.engine.context import Context
from millpond.knowledge.flows import ingest
from millpond.knowledge.store import KnowledgeStore

RETURNS = b"# Returns\n\nYou may return a kettle within 30 days of delivery, unused, in its box.\n"


def echo(front: Front) -> None:
    async def echo(ctx: Context, given: Any) -> Any:
        return given

    front.flow(echo)


async def test_work_is_held_and_let_go(front: Front, pond: AsyncClient) -> None:
    echo(front)
    async with front.worker():
        held = [
            await pond.queues.pause("default", "repairs"),
            await pond.flows.pause("echo", "new prompt"),
            await pond.org.pause("stocktaking"),
        ]
        assert [pause.scope for pause in held] == ["queue", "flow", "org"]
        assert {pause.id async for pause in pond.pauses.list()} == {pause.id for pause in held}
        assert {pause.reason for pause in (await pond.flows.get("echo")).pauses} == {
            "repairs",
            "new prompt",
            "stocktaking",
        }
        run = await pond.runs.start("echo", 1)
        assert [reason.kind for reason in (await run.why()).reasons] == ["paused"] * 3
        resumed = [
            await pond.queues.resume("default"),
            await pond.flows.resume("echo"),
            await pond.org.resume(),
        ]
        assert all(one.was_paused for one in resumed)
        assert await run.result(timeout_s=20) == 1
        assert not (await pond.org.resume()).was_paused


async def test_limits_are_set_listed_and_removed(front: Front, pond: AsyncClient) -> None:
    made = await pond.limits.put("model:mini", 2)
    assert (made.key, made.maximum, made.is_of_platform) == ("model:mini", 2, False)
    rate = await pond.limits.put("model:mini", 60, kind="rate", period_s=60.0, burst=5)
    assert [limit.id async for limit in pond.limits.list()] == [made.id, rate.id]
    assert [run.flow async for run in pond.limits.recorded_runs()] == []
    assert "org" in {one.of async for one in pond.limits.saturation(starved_after_s=5)}
    assert [one.of async for one in pond.platform.saturation(of="limit")] == []
    await pond.limits.delete("model:mini", kind="rate")
    await pond.limits.delete("model:mini")
    assert [limit.id async for limit in pond.limits.list()] == []
    shared = await pond.platform.put_limit("model:mini", 9)
    assert [limit.id async for limit in pond.platform.limits()] == [shared.id]
    await pond.platform.delete_limit("model:mini")


async def test_brakes_are_listed_and_taken_off(front: Front, pond: AsyncClient) -> None:
    for owner in (front.org_id, 0):
        async with front.engine_db.duty("test") as con:
            await con.execute(
                "insert into brake (owner, key, until_us, factor, in_use, hits, over_us, step, reason)"
                " values ($1, 'model:mini', $2, 0.5, 1, 1, $2, 'ask', 'model_rate_limited')",
                *(owner, 2**52),
            )
    (shared, own) = [brake async for brake in pond.limits.brakes()]
    assert (shared.is_of_platform, own.is_of_platform) == (True, False)
    assert (own.key, own.state, own.factor) == ("model:mini", "cooling", 0.0)
    await pond.limits.release("model:mini")
    assert [brake.id async for brake in pond.platform.brakes()] == [shared.id]
    await pond.platform.release("model:mini")
    assert [brake.id async for brake in pond.limits.brakes()] == []


async def test_an_operator_holds_a_queue_for_everyone(front: Front, pond: AsyncClient) -> None:
    await front.publish()
    token = front.token(permissions=ALL - {"platform:operate"})
    async with AsyncClient(front.url, token=token, patience=QUICK) as other:
        with pytest.raises(Forbidden):
            await other.queues.pause("default", everyone=True)
    assert (await pond.queues.pause("default", everyone=True)).scope == "everyone"
    run = await pond.runs.start("echo")
    (queue,) = [queue async for queue in pond.queues.list()]
    assert (queue.queued, [pause.scope for pause in queue.pauses]) == (1, ["everyone"])
    assert (await run.why()).reasons[0].kind == "paused"
    assert (await pond.queues.resume("default", everyone=True)).was_paused


async def test_workers_and_flows_are_listed(front: Front, pond: AsyncClient) -> None:
    echo(front)
    async with front.worker(default=3):
        (worker,) = [worker async for worker in pond.workers.list()]
        assert (worker.queues, worker.flows) == ({"default": 3}, ["echo@1"])
        (flow,) = [flow async for flow in pond.flows.list()]
        assert (flow.name, flow.is_served, flow.may_start) == ("echo", True, True)
    with pytest.raises(NotFound):
        await pond.flows.get("nothing")


async def test_a_document_is_uploaded_listed_and_found(front: Front) -> None:
    def use() -> None:
        with Client(front.url, token=front.token(), patience=QUICK) as pond:
            run = pond.knowledge.upload("shop", "returns.md", RETURNS)
            assert run.data.flow == "knowledge.ingest"
            assert run.wait(timeout_s=60).state == "succeeded"
            (document,) = pond.knowledge.documents("shop")
            assert (document.filename, document.state) == ("returns.md", "ready")
            assert document.run_id == run.id
            found = pond.knowledge.search("shop", "How long can I return a kettle?", limit=1)
            assert "30 days" in found.data[0].text
            assert [base.name for base in pond.knowledge.list()] == ["shop"]

    front.registry.add_flow(ingest)
    store = front.app.state.ports.knowledge
    async with front.worker({KnowledgeStore: store}, index=2):
        await asyncio.to_thread(use)


async def test_an_upload_under_one_key_is_stored_once(front: Front, pond: AsyncClient) -> None:
    first = await pond.knowledge.upload("shop", "returns.md", RETURNS, idempotency_key="k")
    again = await pond.knowledge.upload("shop", "returns.md", RETURNS, idempotency_key="k")
    assert again.id == first.id
    (document,) = [document async for document in pond.knowledge.documents("shop")]
    assert document.version == 1
