"""Following a run over a real socket: streams that break, resume and end."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import aclosing, asynccontextmanager

import pytest
from rich.console import Console

from millpond.cli import remote as remote_module
from millpond.cli.growing import Growing
from millpond.cli.remote import Remote
from millpond.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    Permanent,
    Unauthenticated,
    Unavailable,
)

RUN = "01920000-0000-7000-8000-000000000000"
KINDS = ["run.queued", "run.started", "step.succeeded", "run.succeeded"]


def event(number):
    return {"run_id": RUN, "id": number, "kind": KINDS[number - 1], "data": {}, "step": None}


def frame(number):
    return f"id: {number}\nevent: {KINDS[number - 1]}\ndata: {json.dumps(event(number))}\n\n"


class Server:
    """A bare HTTP server: answers each request by the next of its scripted replies."""

    def __init__(self, replies):
        self.replies = list(replies)
        self.requests = []

    async def handle(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        status, kind, body = self.replies.pop(0)
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n".encode())
        writer.write(b"connection: close\r\n\r\n" + body.encode())
        await writer.drain()
        writer.close()

    def last_ids(self):
        lines = [line for head in self.requests for line in head.split("\r\n")]
        return [line.split(": ")[1] for line in lines if line.lower().startswith("last-event-id")]


@asynccontextmanager
async def serving(*replies):
    server = Server(replies)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, Remote.connect(url, "t0ken") as remote:
        yield server, remote


def stream(*numbers, status=200):
    return status, "text/event-stream", "".join(frame(number) for number in numbers)


def document(body, status=200):
    return status, "application/json", json.dumps(body)


async def follow(remote, after=0):
    async with aclosing(remote.follow(RUN, after)) as events:
        return [event["id"] async for event in events]


async def test_a_broken_stream_is_resumed_after_the_last_event_seen():
    running = document({"id": RUN, "state": "running"})
    async with serving(stream(1, 2), running, stream(2, 3, 4)) as (server, remote):
        assert await follow(remote) == [1, 2, 3, 4]
    assert server.last_ids() == ["0", "2"]
    assert "authorization: Bearer t0ken" in server.requests[0].replace(
        "Authorization", "authorization"
    )


async def test_a_server_that_is_too_busy_is_asked_again():
    async with serving(stream(status=503), stream(1, 2, 3, 4)) as (_, remote):
        assert await follow(remote) == [1, 2, 3, 4]


async def test_following_a_finished_run_after_its_last_event_ends():
    replies = stream(), document({"id": RUN, "state": "succeeded"}), document({"data": []})
    async with serving(*replies) as (_, remote):
        assert await follow(remote, after=4) == []


async def test_a_refused_stream_is_an_error_and_not_tried_again():
    async with serving(document({"detail": "no such run"}, status=404)) as (server, remote):
        with pytest.raises(NotFound, match="no such run"):
            await follow(remote)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidInput),
        (401, Unauthenticated),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (422, InvalidInput),
        (429, Unavailable),
        (500, Permanent),
        (503, Unavailable),
    ],
)
async def test_a_problem_document_becomes_the_error_of_its_status(status, kind):
    problem = {
        "detail": "it is so",
        "code": "so_it_is",
        "advice": "do this",
        "error": {"message": "it is so", "param": "input.x"},
    }
    async with serving(document(problem, status=status)) as (_, remote):
        with pytest.raises(kind) as caught:
            await remote.get("/v1/runs")
    error = caught.value
    assert (error.message, error.code) == ("it is so", "so_it_is")
    assert error.advice == ("do this" if status != 401 else remote_module._SIGN_IN)
    assert error.param == "input.x"


async def test_an_answer_that_is_not_json_says_so():
    async with serving((200, "text/html", "<html>")) as (_, remote):
        with pytest.raises(Permanent, match="did not answer with JSON"):
            await remote.get("/v1/runs")


async def test_a_server_that_is_away_is_unavailable_with_advice():
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    listener.close()
    await listener.wait_closed()
    async with Remote.connect(url, None) as remote:
        with pytest.raises(Unavailable) as caught:
            await remote.get("/v1/runs")
    assert "millpond up" in caught.value.advice


def delta(n, text="", tries=1):
    body = {"object": "delta", "run_id": RUN, "step": "say:0", "attempt": 1, "tries": tries, "n": n}
    return f"event: delta\ndata: {json.dumps({**body, 'text': text})}\n\n"


async def test_text_is_given_once_to_who_watches_and_not_to_who_follows():
    broken = frame(1) + delta(1, "Good ") + delta(2, "mor")
    rest = delta(1, "Good ") + delta(2, "mor") + delta(3, "ning") + frame(2) + frame(3) + frame(4)
    running = document({"id": RUN, "state": "running"})
    streams = [(200, "text/event-stream", text) for text in (broken, rest)]
    async with serving(streams[0], running, streams[1]) as (server, remote):
        async with aclosing(remote.watch(RUN)) as told:
            found = [one.get("text") or one["id"] async for one in told]
        assert found == [1, "Good ", "mor", "ning", 2, 3, 4]
    assert server.last_ids() == ["0", "1"]
    async with serving((200, "text/event-stream", rest + frame(1))) as (_, remote):
        assert await follow(remote, after=1) == [2, 3, 4]


async def test_the_feed_goes_on_from_the_last_place_when_its_stream_breaks():
    def told(place):
        return f"id: {place}\nevent: run.queued\ndata: {json.dumps({**event(1), 'id': place})}\n\n"

    now = document({"data": [], "last_id": "5-x-0", "has_more": False})
    streams = [(200, "text/event-stream", text) for text in (told("6-a-1"), told("7-b-1"))]
    wanted = {"flow": "echo", "kind": None}
    async with (
        serving(now, *streams) as (server, remote),
        aclosing(remote.feed("now", wanted)) as events,
    ):
        assert [(await anext(events))["id"] for _ in range(2)] == ["6-a-1", "7-b-1"]
    assert server.last_ids() == ["5-x-0", "6-a-1"]
    assert "flow=echo" in server.requests[1].splitlines()[0]
    assert "kind" not in server.requests[1].splitlines()[0]


def test_text_grows_on_a_terminal_between_lines_of_events():
    def shown(**options):
        page = io.StringIO()
        growing = Growing(Console(file=page, width=80, color_system=None, **options))
        told = {"at": "2026-01-01T00:00:00Z", "data": {}, "step": None}
        for text, tries in (("Good ", 1), ("mor\x1b[2J\rning", 1), ("again", 2)):
            growing.show({"step": "say:0", "attempt": 1, "tries": tries, "text": text})
        growing.show({**told, "kind": "run.succeeded"})
        return page.getvalue().splitlines()

    lines = [line.strip() for line in shown(force_terminal=True)]
    assert lines[:4] == ["say:0:", "Good mor[2Jning", "say:0:", "again"]
    assert lines[4].endswith("run.succeeded")
    assert len(shown(force_terminal=False)) == 1
