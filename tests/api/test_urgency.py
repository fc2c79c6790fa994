"""The class of runs by HTTP: the flow's, or a lesser one, shown wherever runs and flows are."""

from __future__ import annotations

import asyncio

from .conftest import Client, Front, until


async def test_a_run_has_the_class_of_its_flow_or_a_lesser_one(front: Front, ann: Client) -> None:
    await front.publish("chat", urgency="interactive")
    shown = {}
    for wish in ({}, {"urgency": "standard"}, {"urgency": "interactive"}):
        run = (await ann.post("/v1/runs", json={"flow": "chat", **wish})).json()
        shown[wish.get("urgency")] = (await ann.get(f"/v1/runs/{run['id']}")).json()["urgency"]
    assert shown == {None: "interactive", "standard": "standard", "interactive": "interactive"}
    (flow,) = (await ann.get("/v1/flows")).json()["data"]
    assert flow["urgency"] == "interactive"


async def test_no_run_is_called_more_urgent_than_its_flow(front: Front, ann: Client) -> None:
    await front.publish()
    refused = await ann.post("/v1/runs", json={"flow": "echo", "urgency": "interactive"})
    assert refused.status_code == 422
    assert refused.json()["code"] == "urgency_above_flow"
    assert (await ann.post("/v1/runs", json={"flow": "echo", "urgency": "soon"})).status_code == 422


async def test_a_rerun_has_the_class_of_the_run_that_it_repeats(front: Front, ann: Client) -> None:
    await front.publish("chat", urgency="interactive")
    for urgency in ("interactive", "standard"):
        run = (await ann.post("/v1/runs", json={"flow": "chat", "urgency": urgency})).json()
        await ann.post(f"/v1/runs/{run['id']}/cancel")
        again = (await ann.post(f"/v1/runs/{run['id']}/rerun", json={})).json()
        assert (await ann.get(f"/v1/runs/{again['id']}")).json()["urgency"] == urgency


async def test_why_tells_of_interactive_work(front: Front, ann: Client) -> None:
    over = asyncio.Event()

    async def chat(_ctx: object, _: object) -> None:
        await over.wait()

    front.flow(chat, urgency="interactive")
    async with front.worker(default=1):
        first, second = [
            (await ann.post("/v1/runs", json={"flow": "chat"})).json()["id"] for _ in range(2)
        ]
        await until(ann, first, "run.started")
        (reason,) = (await ann.get(f"/v1/runs/{second}/why")).json()["reasons"]
        over.set()
    assert (reason["kind"], reason["urgency"]) == ("in_line", "interactive")
    assert "in line of interactive work" in reason["text"]
