"""The feed of all runs: pages, a stream that resumes, filters, and a transaction that is held open."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from millpond.client import AsyncClient
from millpond.engine.submit import submit
from millpond.types import Intent

from .conftest import Client, Front

PATH = "/v1/run-events"


async def everything(client: Client, count: int, **params: Any) -> list[dict[str, Any]]:
    """Read page after page until so many events are there."""
    found: list[dict[str, Any]] = []
    after = ""
    async with asyncio.timeout(20):
        while True:
            page = (await client.get(PATH, params={**params, "after": after, "limit": 2})).json()
            found += page["data"]
            after = page["last_id"]
            if not page["has_more"] and len(found) >= count:
                return found
            await asyncio.sleep(0.01)


async def test_pages_and_stream_tell_the_same_and_a_stream_resumes(
    front: Front, ann: Client
) -> None:
    async def echo(ctx: Any, value: Any) -> Any:
        return value

    front.flow(echo)
    async with front.worker():
        runs = [
            (await ann.post("/v1/runs", json={"flow": "echo", "input": n})).json()["id"]
            for n in range(3)
        ]
        for run in runs:
            await front.ended(ann, run)
    paged = await everything(ann, 9)
    assert {one["run_id"] for one in paged} == set(runs)
    assert {(one["object"], one["flow"]) for one in paged} == {("run_event", "echo")}
    for run in runs:  # a claim that was under way as the run came may be told of before it
        assert sorted(one["number"] for one in paged if one["run_id"] == run) == [1, 2, 3]

    async def streamed(after: str, count: int) -> list[dict[str, Any]]:
        headers = {"Last-Event-ID": after} if after else {}
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(20), ann.sse(PATH, headers=headers) as source:
            async for message in source:
                event = orjson.loads(message.data)
                assert (message.id, message.event) == (event["id"], event["kind"])
                found.append(event)
                if len(found) == count:
                    break
        return found

    assert await streamed("", 9) == paged
    for nth in (0, 4, 7):
        assert await streamed(paged[nth]["id"], 8 - nth) == paged[nth + 1 :]
    ends = await everything(ann, 3, kind=["run.succeeded", "run.failed"], flow="echo")
    assert [one["kind"] for one in ends] == ["run.succeeded"] * 3
    assert await everything(ann, 0, flow="nothing") == []


async def test_a_late_commit_is_not_skipped(front: Front, ann: Client) -> None:
    await front.publish()
    await ann.post("/v1/runs", json={"flow": "echo"})
    (first,) = await everything(ann, 1)
    late = Intent(
        org_id=front.org_id, flow="echo", version=1, queue="default", input=b"1", subject="user:a"
    )
    async with front.db.org(front.org_id) as con:
        await submit(con, [late])
        early = (await ann.post("/v1/runs", json={"flow": "echo"})).json()["id"]
        page = (await ann.get(PATH, params={"after": first["id"]})).json()
        assert (page["data"], page["has_more"]) == ([], False)
    found = await everything(ann, 3)
    assert [one["run_id"] for one in found[1:]] == [str(late.run_id), early]


async def test_a_stream_from_now_on_tells_its_place_before_the_first_event(
    front: Front, ann: Client
) -> None:
    """Who breaks off before it goes on there, and not from a later now."""
    await front.publish()
    await ann.post("/v1/runs", json={"flow": "echo"})
    await everything(ann, 1)
    async with asyncio.timeout(20), ann.sse(PATH, params={"after": "now"}) as source:
        message = await anext(aiter(source))
    assert message.data == ""
    run = (await ann.post("/v1/runs", json={"flow": "echo"})).json()["id"]
    async with asyncio.timeout(20):
        while True:
            page = (await ann.get(PATH, params={"after": message.id})).json()
            if page["data"]:
                break
            await asyncio.sleep(0.01)
    assert [(one["run_id"], one["number"]) for one in page["data"]] == [(run, 1)]


@pytest.mark.parametrize("after", ["x", "1-2-3", "-1", "9" * 70])
async def test_a_place_that_nobody_gave_out_is_refused(ann: Client, after: str) -> None:
    assert (await ann.get(PATH, params={"after": after})).status_code == 422
    headers = {"Accept": "text/event-stream", "Last-Event-ID": after}
    assert (await ann.get(PATH, headers=headers)).status_code in (400, 422)


async def test_the_client_follows_all_runs_from_now_on(front: Front, ann: Client) -> None:
    await front.publish()
    await ann.post("/v1/runs", json={"flow": "echo"})
    await everything(ann, 1)
    async with asyncio.timeout(20), AsyncClient(front.url, token=front.token()) as pond:
        page = await pond.runs.feed_page(after="now")
        events = pond.follow_all(after=str(page.last_id), kind="run.queued")
        run = await pond.runs.start("echo")
        event = await anext(events)
        assert (event.run_id, event.flow, event.number) == (run.id, "echo", 1)
        await events.aclose()
        listed = [one async for one in pond.runs.feed(limit=1)]
        assert [one.kind for one in listed] == ["run.queued", "run.queued"]
