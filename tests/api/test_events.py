"""Events: pages, streams, resuming, ending, and shutting down with streams open."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from millpond.api.sse import EventStream, frame
from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.engine.events import Event
from millpond.errors import Unavailable
from millpond.types import new_id

from .conftest import ALL, Client, Front, opened, served, stream


async def finished(front: Front, client: Client) -> str:
    """Run a flow with three steps to its end."""

    async def one(number: int) -> int:
        return number

    async def steps(ctx: Any, _: Any) -> int:
        total = 0
        for number in range(3):
            total += await ctx.step("add", one, number)
        await ctx.emit("counted", {"total": total})
        return total

    front.flow(steps)
    async with front.worker():
        run: str = (await client.post("/v1/runs", json={"flow": "steps"})).json()["id"]
        assert (await front.ended(client, run))["output"] == 3
    return run


async def collected(
    client: Client, run_id: str, *, after: int | None = None, resume: str | None = None
) -> list[dict[str, Any]]:
    async with asyncio.timeout(20):
        return [
            orjson.loads(message.data)
            async for message in stream(client, run_id, after=after, resume=resume)
        ]


async def test_run_shows_its_steps(front: Front, ann: Client) -> None:
    run = (await ann.get(f"/v1/runs/{await finished(front, ann)}")).json()
    steps = [step for step in run["steps"] if step["kind"] == "step"]
    assert [step["output"] for step in steps] == [0, 1, 2]
    assert {step["name"] for step in steps} == {"add"}
    assert {step["state"] for step in steps} == {"done"}
    assert run["started_at"] <= run["finished_at"]


async def test_stream_and_pages_tell_the_same(front: Front, ann: Client) -> None:
    run_id = await finished(front, ann)
    streamed = await collected(ann, run_id)
    paged: list[dict[str, Any]] = []
    after = 0
    while True:
        page = (
            await ann.get(f"/v1/runs/{run_id}/events", params={"after": after, "limit": 2})
        ).json()
        paged += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert streamed == paged
    assert [event["id"] for event in streamed] == list(range(1, len(streamed) + 1))
    kinds = [event["kind"] for event in streamed]
    assert kinds[0] == "run.queued"
    assert kinds.count("step.succeeded") == 3
    assert kinds[-1] == "run.succeeded"
    assert all(event["run_id"] == run_id for event in streamed)


async def test_stream_lines_carry_number_and_kind(front: Front, ann: Client) -> None:
    run_id = await finished(front, ann)
    async with asyncio.timeout(20):
        messages = [message async for message in stream(ann, run_id)]
    for message in messages:
        event = orjson.loads(message.data)
        assert message.id == str(event["id"])
        assert message.event == event["kind"]
    response = await ann.get(f"/v1/runs/{run_id}/events", headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert response.text.startswith("retry: 1000\nid: 1\nevent: run.queued\ndata: {")


async def test_resume_loses_nothing_and_repeats_nothing(front: Front, ann: Client) -> None:
    run_id = await finished(front, ann)
    whole = await collected(ann, run_id)
    for number in range(len(whole)):
        assert await collected(ann, run_id, resume=str(number)) == whole[number:]
        assert await collected(ann, run_id, after=number) == whole[number:]


async def test_last_event_id_goes_before_after(front: Front, ann: Client) -> None:
    run_id = await finished(front, ann)
    whole = await collected(ann, run_id)
    assert await collected(ann, run_id, after=1, resume="3") == whole[3:]


async def test_resume_after_the_end_says_that_nothing_is_left(front: Front, ann: Client) -> None:
    run_id = await finished(front, ann)
    last = len(await collected(ann, run_id))
    for number in (last, last + 5, 2**32):
        response = await ann.get(
            f"/v1/runs/{run_id}/events",
            headers={"Accept": "text/event-stream", "Last-Event-ID": str(number)},
        )
        assert response.status_code == 204
    assert await collected(ann, run_id, resume=str(last)) == []


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "٣", "1" * 11])
async def test_malformed_last_event_id(front: Front, ann: Client, number: str) -> None:
    await front.publish()
    run = (await ann.post("/v1/runs", json={"flow": "echo"})).json()
    response = await ann.get(
        f"/v1/runs/{run['id']}/events",
        headers=[(b"Accept", b"text/event-stream"), (b"Last-Event-ID", number.encode())],
    )
    assert response.status_code == 400


async def test_events_of_no_run(front: Front, ann: Client) -> None:
    path = "/v1/runs/0199aaaa-0000-7000-8000-000000000000/events"
    assert (await ann.get(path)).status_code == 404
    streamed = await ann.get(path, headers={"Accept": "text/event-stream"})
    assert streamed.status_code == 404
    assert streamed.headers["content-type"] == "application/problem+json"


async def test_stream_follows_a_run_live(front: Front, ann: Client) -> None:
    go = asyncio.Event()

    async def held(ctx: Any, _: Any) -> str:
        await go.wait()
        return "done"

    front.flow(held)
    seen: list[str] = []
    async with front.worker(), asyncio.timeout(20):
        run = (await ann.post("/v1/runs", json={"flow": "held"})).json()
        async for message in stream(ann, run["id"]):
            seen.append(message.event)
            if message.event == "run.started":
                go.set()  # nothing more comes unless the stream is live
    assert seen == ["run.queued", "run.started", "run.succeeded"]


async def test_many_follow_one_run(front: Front, ann: Client) -> None:
    await front.publish()
    run = (await ann.post("/v1/runs", json={"flow": "echo"})).json()
    followers = [asyncio.create_task(collected(ann, run["id"])) for _ in range(10)]
    await ann.post(f"/v1/runs/{run['id']}/cancel")
    told = await asyncio.gather(*followers)
    assert all([event["kind"] for event in one] == ["run.queued", "run.cancelled"] for one in told)


async def test_client_that_leaves_ends_its_stream(front: Front, ann: Client) -> None:
    await front.publish()
    run = (await ann.post("/v1/runs", json={"flow": "echo"})).json()
    async with asyncio.timeout(20):
        async with ann.sse(f"/v1/runs/{run['id']}/events") as source:
            async for message in source:
                assert message.event == "run.queued"
                break
            assert pumps() == 1
        await ann.aclose()
        while pumps():
            await asyncio.sleep(0.01)


def pumps() -> int:
    """Count the streams that this process is sending."""
    return sum(task.get_name().startswith("sse.pump") for task in asyncio.all_tasks())


async def test_shutdown_ends_open_streams(urls: Urls, db: Database, org: int) -> None:
    from millpond.types import Intent, Principal

    principal = Principal(org_id=org, subject="user:ann", permissions=ALL)
    from millpond.engine.submit import submit

    intent = Intent(
        org_id=org, flow="echo", version=1, queue="default", input=b"{}", subject="user:ann"
    )
    async with db.org(org) as con:
        await submit(con, [intent])
    import httpx2

    async with opened(urls, db) as app:
        token = app.state.ports.gate.keyring.mint(principal, "pond", 60)
        headers = {"Authorization": f"Bearer {token}"}
        following: list[asyncio.Task[list[str]]] = []
        async with httpx2.AsyncClient(headers=headers, trust_env=False, timeout=60) as client:
            begun = asyncio.Semaphore(0)

            async def follow(url: str) -> list[str]:
                kinds = []
                path = f"{url}/v1/runs/{intent.run_id}/events"
                async with client.sse(path) as source:
                    async for message in source:
                        kinds.append(message.event)
                        begun.release()
                return kinds

            async with served(app, grace_s=60) as url, asyncio.timeout(20):
                following = [asyncio.create_task(follow(url)) for _ in range(3)]
                for _ in following:
                    await begun.acquire()
            # Leaving the block stopped the server; with open streams it would still be waiting.
            async with asyncio.timeout(20):
                told = await asyncio.gather(*following)
    assert told == [["run.queued"]] * 3
    assert pumps() == 0


def event(number: int, kind: str = "progress", data: Any = None) -> Event:
    return Event(
        run_id=new_id(),
        event_no=number,
        kind=kind,
        step_key=None,
        data=data or {},
        at=datetime.now(UTC),
    )


def test_frame_has_one_data_line_whatever_the_data() -> None:
    text = frame(event(7, data={"text": "a\nb\r\nc\u2028\x00: d"})).decode()
    assert text.startswith("id: 7\nevent: progress\ndata: {")
    assert text.count("\n") == 4
    assert text.endswith("}\n\n")


class Wire:
    """The server's side of one connection."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.is_ended = False

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            if message["body"]:
                self.sent.put_nowait(message["body"])
            self.is_ended = not message.get("more_body", False)


async def test_quiet_stream_keeps_the_connection_alive() -> None:
    more = asyncio.Event()

    async def quiet(after: int) -> AsyncIterator[Event]:
        await more.wait()
        yield event(1, "run.succeeded")

    wire = Wire()
    response = EventStream(quiet, after=0, stopping=asyncio.Event(), keep_alive_s=0.01)
    serving = asyncio.create_task(response({"type": "http"}, wire.receive, wire.send))
    async with asyncio.timeout(20):
        for _ in range(3):
            assert await wire.sent.get() == b": keep-alive\n\n"
        more.set()
        while not (chunk := await wire.sent.get()).startswith(b"retry: 1000\nid: 1\n"):
            assert chunk == b": keep-alive\n\n"
        await serving
    assert wire.is_ended


async def test_stream_goes_on_after_the_database_was_away() -> None:
    opens = itertools.count()

    async def flaky(after: int) -> AsyncIterator[Event]:
        if next(opens) % 2:
            raise Unavailable("away", retry_after_s=0.01)
        yield event(after + 1, "run.succeeded" if after == 3 else "progress")
        if after < 3:
            raise Unavailable("away", retry_after_s=0.01)

    wire = Wire()
    response = EventStream(flaky, after=0, stopping=asyncio.Event())
    async with asyncio.timeout(20):
        await response({"type": "http"}, wire.receive, wire.send)
    chunks = [wire.sent.get_nowait() for _ in range(wire.sent.qsize())]
    assert [chunk.partition(b"event: ")[0] for chunk in chunks] == [
        b"retry: 1000\nid: 1\n",
        b"id: 2\n",
        b"id: 3\n",
        b"id: 4\n",
    ]


async def test_gone_client_closes_the_tail_and_gets_nothing_more() -> None:
    is_closed = asyncio.Event()

    async def endless(after: int) -> AsyncIterator[Event]:
        yield event(1)
        try:
            await asyncio.Event().wait()
        finally:
            is_closed.set()

    wire = Wire()
    response = EventStream(endless, after=0, stopping=asyncio.Event())
    serving = asyncio.create_task(response({"type": "http"}, wire.receive, wire.send))
    async with asyncio.timeout(20):
        await wire.sent.get()
        wire.gone.set()
        await serving
    assert is_closed.is_set()
    assert not wire.is_ended
