"""POST /v1/runs/{id}/cancel in every state of a run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import Client, Front, until


async def start(client: Client, flow: str = "echo", **body: Any) -> str:
    run: str = (await client.post("/v1/runs", json={"flow": flow, **body})).json()["id"]
    return run


@pytest.mark.parametrize("delay_s", [0, 3600])
async def test_run_that_nobody_executes_ends_at_once(
    front: Front, ann: Client, delay_s: float
) -> None:
    await front.publish()
    run_id = await start(ann, delay_s=delay_s)
    response = await ann.post(f"/v1/runs/{run_id}/cancel", json={"reason": "not needed"})
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/runs/{run_id}"
    assert response.json()["state"] == "cancelled"
    events = (await ann.get(f"/v1/runs/{run_id}/events")).json()["data"]
    assert events[-1]["kind"] == "run.cancelled"
    assert events[-1]["data"]["reason"] == "not needed"
    assert (await ann.get("/v1/queues")).json()["data"] == []


async def test_running_run_stops(front: Front, ann: Client) -> None:
    was_unwound = asyncio.Event()

    async def hold(ctx: Any, _: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_unwound.set()

    front.flow(hold)
    async with front.worker():
        run_id = await start(ann, "hold")
        await until(ann, run_id, "run.started")
        response = await ann.post(f"/v1/runs/{run_id}/cancel")
        assert response.status_code == 202
        ended = await front.ended(ann, run_id)
    assert ended["state"] == "cancelled"
    assert was_unwound.is_set()


async def test_sleeping_run_stops(front: Front, ann: Client) -> None:
    async def nap(ctx: Any, _: Any) -> None:
        await ctx.sleep(3600)

    front.flow(nap)
    async with front.worker():
        run_id = await start(ann, "nap")
        await until(ann, run_id, "run.waiting")
        assert (await ann.get(f"/v1/runs/{run_id}")).json()["state"] == "waiting"
        response = await ann.post(f"/v1/runs/{run_id}/cancel")
    assert response.json()["state"] == "cancelled"


async def test_cancelling_a_cancelled_run_again_changes_nothing(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    first = await ann.post(f"/v1/runs/{run_id}/cancel", json={"reason": "first"})
    again = await ann.post(f"/v1/runs/{run_id}/cancel", json={"reason": "again"})
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    events = (await ann.get(f"/v1/runs/{run_id}/events")).json()["data"]
    assert [event["data"]["reason"] for event in events if event["kind"] == "run.cancelled"] == [
        "first"
    ]


async def test_a_run_that_ended_otherwise_cannot_be_cancelled(front: Front, ann: Client) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        return given

    front.flow(echo)
    async with front.worker():
        run_id = await start(ann)
        await front.ended(ann, run_id)
    response = await ann.post(f"/v1/runs/{run_id}/cancel")
    assert response.status_code == 409
    assert f"{run_id} is already succeeded" in response.json()["detail"]
    assert response.json()["code"] == "already_finished"
    assert response.json()["error"]["type"] == "conflict_error"


async def test_of_many_cancels_one_counts(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    responses = await asyncio.gather(*(ann.post(f"/v1/runs/{run_id}/cancel") for _ in range(8)))
    assert sorted(response.status_code for response in responses) == [202] * 8
    events = (await ann.get(f"/v1/runs/{run_id}/events")).json()["data"]
    assert [event["kind"] for event in events] == ["run.queued", "run.cancelled"]


async def test_unknown_run(front: Front, ann: Client) -> None:
    response = await ann.post("/v1/runs/0199aaaa-0000-7000-8000-000000000000/cancel")
    assert response.status_code == 404


async def test_body_is_optional_but_checked(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    wrong = await ann.post(f"/v1/runs/{run_id}/cancel", json={"reason": 7, "force": True})
    assert wrong.status_code == 422
    assert {fault["param"] for fault in wrong.json()["errors"]} == {"reason", "force"}
    assert (await ann.post(f"/v1/runs/{run_id}/cancel", json={})).status_code == 202


async def test_who_may_only_cancel_is_not_shown_what_the_run_is_about(
    front: Front, ann: Client
) -> None:
    await front.publish()
    run_id = await start(ann, input={"secret": 1}, labels={"who": "x"}, dedup_key="k")
    narrow = await front.client(permissions=frozenset({"runs:cancel"}))
    shown = (await narrow.post(f"/v1/runs/{run_id}/cancel")).json()
    assert (shown["id"], shown["flow"], shown["state"]) == (run_id, "echo", "cancelled")
    assert (shown["input"], shown["labels"], shown["dedup_key"]) == (None, {}, None)
