"""POST /v1/runs/{id}/signals: told once per key, by who may, to runs that are alive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import ALL, Client, Front, until


async def start(client: Client, flow: str = "echo", **body: Any) -> str:
    run: str = (await client.post("/v1/runs", json={"flow": flow, **body})).json()["id"]
    return run


async def send(
    client: Client, run_id: str, name: str = "go", data: Any = None, key: str = ""
) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"name": name, "data": data}
    return await client.post(f"/v1/runs/{run_id}/signals", json=body, headers=headers)


async def test_a_waiting_run_goes_on_and_shows_its_state(front: Front, ann: Client) -> None:
    async def listen(ctx: Any, _: Any) -> Any:
        await ctx.set_state("stage", {"name": "listening"})
        told = await ctx.wait_event("go")
        return [told.data, told.sent_by]

    front.flow(listen)
    async with front.worker():
        run_id = await start(ann, "listen")
        await until(ann, run_id, "run.waiting")
        shown = (await ann.get(f"/v1/runs/{run_id}")).json()
        assert shown["state"] == "waiting"
        assert shown["state_values"] == {"stage": {"name": "listening"}}
        response = await send(ann, run_id, data={"pages": 3})
        assert response.status_code == 202
        assert response.headers["location"] == f"/v1/runs/{run_id}"
        assert response.json()["name"] == "go"
        ended = await front.ended(ann, run_id)
    assert ended["output"] == [{"pages": 3}, "user:ann"]
    assert ended["parent_id"] is None


async def test_a_repeat_under_one_key_sends_nothing(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    first = await send(ann, run_id, data=1, key="k-1")
    again = await send(ann, run_id, data=1, key="k-1")
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    responses = await asyncio.gather(*(send(ann, run_id, data=2, key="k-2") for _ in range(6)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    events = (await ann.get(f"/v1/runs/{run_id}/events")).json()["data"]
    assert [event["kind"] for event in events].count("signal.received") == 2
    other = await send(ann, run_id, data=3, key="k-1")
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"
    await ann.post(f"/v1/runs/{run_id}/cancel")
    assert (await send(ann, run_id, data=1, key="k-1")).json() == first.json()


async def test_a_run_that_has_ended_or_is_unknown(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    await ann.post(f"/v1/runs/{run_id}/cancel")
    ended = await send(ann, run_id)
    assert (ended.status_code, ended.json()["code"]) == (409, "already_finished")
    unknown = await send(ann, "0199aaaa-0000-7000-8000-000000000000", key="k-3")
    assert unknown.status_code == 404


async def test_the_permission_is_needed(front: Front, ann: Client) -> None:
    await front.publish()
    run_id = await start(ann)
    mute = await front.client(permissions=ALL - {"runs:signal"})
    assert (await send(mute, run_id)).status_code == 403


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "a/b"}, {"name": "a", "to": "b"}])
async def test_the_body_is_checked(front: Front, ann: Client, body: dict[str, Any]) -> None:
    await front.publish()
    run_id = await start(ann)
    assert (await ann.post(f"/v1/runs/{run_id}/signals", json=body)).status_code == 422
