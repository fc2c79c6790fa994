"""Text of steps under way on a run's stream: between the events, without a number, not in the way of resuming."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from millpond.client import AsyncClient, Delta, Event
from millpond.engine.registry import step

from .conftest import Client, Front, stream


async def test_text_comes_between_the_events_without_a_number(front: Front, ann: Client) -> None:
    go = asyncio.Event()

    async def speak(ctx: Any) -> str:
        ctx.delta("Good ")
        await go.wait()
        ctx.delta("morning")
        return "Good morning"

    spoken = step("speak", registry=front.registry)(speak)

    async def greet(ctx: Any, _: Any) -> Any:
        return await ctx.step(spoken)

    front.flow(greet)
    async with front.worker(), asyncio.timeout(20):
        run = (await ann.post("/v1/runs", json={"flow": "greet"})).json()["id"]
        lines: list[str] = []
        path, headers = f"/v1/runs/{run}/events", {"Accept": "text/event-stream"}
        async with ann.stream("GET", path, headers=headers) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if line == "event: delta":
                    go.set()
    blocks = [block.split("\n") for block in "\n".join(lines).strip().split("\n\n")]
    texts = [block for block in blocks if "event: delta" in block]
    assert all(len(block) == 2 and block[1].startswith("data: {") for block in texts)
    deltas = [orjson.loads(block[1][6:]) for block in texts]
    assert [one["text"] for one in deltas] == ["Good ", "morning"]
    assert {(one["object"], one["run_id"], one["step"]) for one in deltas} == {
        ("delta", run, "speak:0")
    }
    numbers = [int(block[0][4:]) for block in blocks if block[0].startswith("id: ")]
    numbers += [int(line[4:]) for line in blocks[0] if line.startswith("id: ")]
    assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
    again = [orjson.loads(one.data) async for one in stream(ann, run, resume="2")]
    assert [one["id"] for one in again] == sorted(set(numbers))[2:]
    assert (await ann.get(f"/v1/runs/{run}")).json()["output"] == "Good morning"


async def test_the_client_gives_text_to_who_watches_and_events_alone_to_who_follows(
    front: Front,
) -> None:
    go = asyncio.Event()

    async def speak(ctx: Any) -> str:
        ctx.delta("Good ")
        await go.wait()
        ctx.delta("morning")
        return "Good morning"

    spoken = step("speak", registry=front.registry)(speak)

    async def greet(ctx: Any, _: Any) -> Any:
        return await ctx.step(spoken)

    front.flow(greet)
    async with (
        front.worker(),
        asyncio.timeout(20),
        AsyncClient(front.url, token=front.token()) as pond,
    ):
        run = await pond.runs.start("greet")
        told: list[Event | Delta] = []
        async for one in run.watch():
            told.append(one)
            if isinstance(one, Delta):
                go.set()
        events = [one async for one in run.events()]
    assert "".join(one.text for one in told if isinstance(one, Delta)) == "Good morning"
    assert events == [one for one in told if isinstance(one, Event)]
