"""Pauses, reasons to wait, workers and queues over HTTP."""

from __future__ import annotations

import asyncio
import platform
from typing import Any

import orjson
import pytest

from millpond.engine.queues import MAX_DEPTH
from millpond.engine.submit import submit
from millpond.types import Intent

from .conftest import ALL, Client, Front, until


@pytest.mark.parametrize(
    ("path", "scope", "shown"),
    [
        ("/v1/queues/default", "queue", "queue:default"),
        ("/v1/flows/echo", "flow", "flow:echo"),
        ("/v1/org", "org", "org"),
    ],
)
async def test_a_pause_is_shown_and_lifted(
    front: Front, ann: Client, path: str, scope: str, shown: str
) -> None:
    async def echo(ctx: Any, given: Any) -> Any:
        return given

    front.flow(echo)
    async with front.worker():
        paused = await ann.post(f"{path}/pause", json={"reason": "repairs"})
        assert paused.status_code == 200
        pause = paused.json()
        assert (pause["id"], pause["scope"]) == (shown, scope)
        assert (pause["paused_by"], pause["reason"]) == ("user:ann", "repairs")
        assert (await ann.get("/v1/pauses")).json()["data"] == [pause]
        run_id = (await ann.post("/v1/runs", json={"flow": "echo", "input": 1})).json()["id"]
        why = (await ann.get(f"/v1/runs/{run_id}/why")).json()
        assert why["state"] == "queued"
        assert [one["scope"] for one in why["reasons"]] == [scope]
        assert "paused by user:ann" in why["text"]
        (queue,) = (await ann.get("/v1/queues")).json()["data"]
        assert queue["pauses"] == ([] if scope == "flow" else [pause])
        assert (await ann.get("/v1/flows/echo")).json()["pauses"] == [pause]
        (listed,) = (await ann.get("/v1/flows")).json()["data"]
        assert listed["pauses"] == [pause]
        resumed = (await ann.post(f"{path}/resume")).json()
        assert resumed["was_paused"]
        assert (await front.ended(ann, run_id))["state"] == "succeeded"
        assert not (await ann.post(f"{path}/resume")).json()["was_paused"]
    assert (await ann.get("/v1/pauses")).json()["data"] == []


async def test_pausing_for_everyone_is_the_operators(
    front: Front, ann: Client, other_org: int
) -> None:
    await front.publish()
    mere = await front.client(permissions=ALL - {"platform:operate"})
    stranger = await front.client(org_id=other_org, permissions=ALL - {"platform:operate"})
    for verb in ("pause", "resume"):
        refused = await mere.post(f"/v1/queues/default/{verb}", json={"everyone": True})
        assert refused.status_code == 403
        assert refused.json()["error"]["param"] == "platform:operate"
    held = await ann.post("/v1/queues/default/pause", json={"everyone": True, "reason": "move"})
    assert held.json()["id"] == "everyone:default"
    assert held.json()["paused_by"] == "user:ann"
    (shown,) = (await stranger.get("/v1/pauses")).json()["data"]
    assert (shown["scope"], shown["paused_by"], shown["reason"]) == ("everyone", "operator", "move")
    run_id = (await stranger.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    why = (await stranger.get(f"/v1/runs/{run_id}/why")).json()
    assert "paused by an operator, for everyone" in why["text"]
    assert "user:ann" not in orjson.dumps(why).decode()
    lifted = await ann.post("/v1/queues/default/resume", json={"everyone": True})
    assert lifted.json() == {"object": "resumed", "was_paused": True, "queues": ["default"]}


async def test_what_does_not_exist_cannot_be_paused(front: Front, ann: Client) -> None:
    await front.publish()
    for path, code in (("queues/x", "queue_not_found"), ("flows/x", "flow_not_found")):
        refused = await ann.post(f"/v1/{path}/pause")
        assert refused.status_code == 404
        assert refused.json()["code"] == code


async def test_reasons_in_another_queue_are_nested(front: Front, ann: Client) -> None:
    async def nap(ctx: Any, _: Any) -> None:
        await ctx.sleep(3600)

    front.flow(nap)
    async with front.worker():
        run_id = (await ann.post("/v1/runs", json={"flow": "nap"})).json()["id"]
        await until(ann, run_id, "run.waiting")
    async with front.engine_db.duty("test") as con:
        await con.execute("update step set kind = 'step', ref = gen_random_uuid()")
        await con.execute(
            "insert into item (org_id, item_id, run_id, state, kind, lane_id, rank, step_key, queue,"
            " capability) select org_id, ref, run_id, 'queued', 'step', 4, 1, step_key, 'sql', 'q'"
            " from step"
        )
    (reason,) = (await ann.get(f"/v1/runs/{run_id}/why")).json()["reasons"]
    assert (reason["kind"], reason["queue"]) == ("other_queue", "sql")
    assert [inner["kind"] for inner in reason["reasons"]] == ["no_worker"]


async def test_workers_are_listed_with_what_they_do(front: Front, ann: Client) -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def hold(ctx: Any, _: Any) -> None:
        began.set()
        await may_end.wait()

    front.flow(hold)
    async with front.worker(default=3) as worker:
        run_id = (await ann.post("/v1/runs", json={"flow": "hold"})).json()["id"]
        await began.wait()
        async with asyncio.timeout(20):
            while not (await ann.get("/v1/workers")).json()["data"][0]["in_use"]:
                await asyncio.sleep(0.05)
        (shown,) = (await ann.get("/v1/workers")).json()["data"]
        may_end.set()
        await front.ended(ann, run_id)
    assert shown["id"] == str(worker.worker_id)
    assert shown["queues"] == {"default": 3}
    assert shown["in_use"] == {"default": 1}
    assert shown["flows"] == ["hold@1"]
    assert shown["release"]
    assert not shown["is_draining"]
    assert 0 <= shown["heartbeat_age_s"] < 20
    assert (await ann.get("/v1/workers")).json()["data"] == []


async def fill(front: Front, number: int, **more: Any) -> None:
    async with front.db.org(front.org_id) as con:
        await submit(
            con,
            [
                Intent(
                    org_id=front.org_id,
                    flow="echo",
                    version=1,
                    queue="default",
                    input=b"1",
                    subject="user:ann",
                    priority=n % 2,
                    **more,
                )
                for n in range(number)
            ],
        )


async def test_queues_count_what_waits_and_rests(front: Front, ann: Client) -> None:
    await fill(front, 5)
    await fill(front, 2, delay_s=60)
    (queue,) = (await ann.get("/v1/queues")).json()["data"]
    assert (queue["queued"], queue["is_depth_exact"]) == (5, True)
    assert (queue["scheduled"], queue["running"], queue["is_rest_exact"]) == (2, 0, True)
    assert queue["oldest_s"] >= 0


async def test_a_long_queue_is_counted_up_to_a_cap(front: Front, ann: Client) -> None:
    for _ in range(3):
        await fill(front, 4000)
    (queue,) = (await ann.get("/v1/queues")).json()["data"]
    assert (queue["queued"], queue["is_depth_exact"]) == (MAX_DEPTH, False)


async def test_more_live_runs_than_are_looked_at_are_told_of(
    front: Front, ann: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.engine.queues._MAX_LIVE_ROWS", 10)
    await fill(front, 11, delay_s=60)
    (queue,) = (await ann.get("/v1/queues")).json()["data"]
    assert not queue["is_rest_exact"]
    assert queue["scheduled"] >= 10


async def test_hosts_of_workers_are_named_to_those_who_may_see_workers(
    front: Front, ann: Client
) -> None:
    may_end = asyncio.Event()

    async def hold(ctx: Any, given: Any) -> None:
        await may_end.wait()

    front.flow(hold)
    await front.publish("echo", queue="nobody")
    narrow = await front.client(permissions=ALL - {"workers:read"})
    async with front.worker():
        running = (await ann.post("/v1/runs", json={"flow": "hold"})).json()["id"]
        await until(ann, running, "run.started")
        queued = (await ann.post("/v1/runs", json={"flow": "echo"})).json()["id"]
        answers = {
            who: [(await client.get(f"/v1/runs/{run_id}/why")).text for run_id in (running, queued)]
            for who, client in (("ann", ann), ("narrow", narrow))
        }
        may_end.set()
        await front.ended(ann, running)
    host = platform.node()
    assert all(f'"host":"{host}"' in text for text in answers["ann"])
    assert f"on {host} (process" in answers["ann"][0]
    for text in answers["narrow"]:
        assert host not in text
        assert '"pid"' not in text
        assert "(process" not in text
