"""The SDK against a real server over real sockets: both clients, repeats, streams, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.api.conftest import Front
from tests.client.conftest import QUICK

from millpond.client import (
    ApiError,
    AsyncClient,
    AsyncRun,
    Client,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    Run,
    RunCancelled,
    RunFailed,
    Unauthenticated,
    Unavailable,
    WaitTimeout,
)
from millpond.client.calls.control import pause_queue
from millpond.client.surface import Group
from millpond.engine.context import Context


def _flows(front: Front) -> None:
    async def double(ctx: Context, n: int) -> int:
        await ctx.emit("seen", {"n": n})
        return 2 * n

    async def ask(ctx: Context, n: int) -> Any:
        decision = await ctx.ask_human("go on", role="support", form={"type": "boolean"})
        return decision.answer

    async def fail(ctx: Context, n: int) -> None:
        from millpond.errors import Permanent

        raise Permanent("there is no pond", code="no_pond")

    for function in (double, ask, fail):
        front.flow(function)


async def test_a_run_is_started_followed_and_its_result_read(
    front: Front,
    pond: AsyncClient,
) -> None:
    _flows(front)
    async with front.worker():
        run = await pond.runs.start("double", 21, labels={"a": "b"})
        kinds = [event.kind async for event in run.events()]
        assert kinds == ["run.queued", "run.started", "progress", "run.succeeded"]
        assert await run.result(timeout_s=10) == 42
        assert run.state == "succeeded"
        assert (await pond.runs.get(run.id)).data.labels == {"a": "b"}


async def test_the_sync_client_does_the_same(front: Front) -> None:
    _flows(front)

    def use() -> tuple[list[str], Any, list[Any]]:
        with Client(front.url, token=front.token(), patience=QUICK) as pond:
            run = pond.runs.start("double", 4)
            kinds = [event.kind for event in run.events()]
            return kinds, run.result(timeout_s=10), [one.id for one in pond.runs.list()]

    async with front.worker():
        kinds, output, ids = await asyncio.to_thread(use)
    assert kinds[-1] == "run.succeeded"
    assert output == 8
    assert len(ids) == 1


async def test_a_failed_and_a_cancelled_run_say_so(front: Front, pond: AsyncClient) -> None:
    _flows(front)
    async with front.worker():
        with pytest.raises(RunFailed, match="there is no pond") as caught:
            await (await pond.runs.start("fail", 1)).result(timeout_s=10)
        assert caught.value.run.error is not None
        assert caught.value.run.error["code"] == "no_pond"
        waits = await pond.runs.start("ask", 1)
        with pytest.raises(WaitTimeout):
            await waits.wait(timeout_s=0.1)
        await waits.cancel("changed my mind")
        with pytest.raises(RunCancelled):
            await waits.result(timeout_s=10)


async def test_a_question_is_found_and_decided_once(front: Front, pond: AsyncClient) -> None:
    _flows(front)
    async with front.worker():
        run = await pond.runs.start("ask", 1)
        async for event in run.events():
            if event.kind == "run.awaiting_input":
                break
        (question,) = (await pond.inputs.page(state="pending")).data
        await pond.inputs.resolve(question.id, answer=True, digest=question.digest)
        assert await run.result(timeout_s=10) is True
        with pytest.raises(Conflict):
            await pond.inputs.resolve(question.id, answer=True)


async def test_lists_go_on_over_pages(front: Front, pond: AsyncClient) -> None:
    _flows(front)
    await front.publish("double")
    ids = [(await pond.runs.start("double", n)).id for n in range(7)]
    assert [run.id async for run in pond.runs.list(limit=3)] == ids[::-1]
    assert [flow.name async for flow in pond.flows.list()] == ["double"]
    newer = pond.runs.list(limit=3, before=ids[2])
    assert {run.id async for run in newer} == set(ids[3:])


async def test_refusals_are_errors_of_their_kind(front: Front, pond: AsyncClient) -> None:
    await front.publish("echo", schema={"type": "object", "required": ["text"]})
    with pytest.raises(InvalidRequest) as caught:
        await pond.runs.start("echo", {})
    assert caught.value.status == 422
    assert caught.value.param is not None
    assert caught.value.request_id
    with pytest.raises(NotFound):
        await pond.runs.get("00000000-0000-0000-0000-000000000000")
    async with AsyncClient(front.url, token="nonsense", patience=QUICK) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.flows.get("echo")
    weak = front.token(permissions=frozenset({"flows:read"}))
    async with AsyncClient(front.url, token=weak, patience=QUICK) as reader:
        with pytest.raises(Forbidden):
            await reader.runs.start("echo", {"text": "x"})


class Mill:
    """A server that answers each request as the next of `script` says, and remembers requests."""

    def __init__(self, script: list[bytes | None]) -> None:
        self.script = script
        self.heads: list[str] = []
        self.bodies: list[bytes] = []

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (
                int(line.split(":")[1])
                for line in head.splitlines()
                if line.lower().startswith("content-length")
            ),
            0,
        )
        self.bodies.append(await reader.readexactly(length))
        self.heads.append(head)
        answer = self.script.pop(0)
        if answer is not None:
            writer.write(answer)
            await writer.drain()
        writer.close()


def _answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


RUN = (
    b'{"id":"018f0000-0000-7000-8000-000000000000","flow":"f","version":1,"queue":"default",'
    b'"state":"queued"}'
)


def _keys(mill: Mill) -> set[str]:
    return {
        line.split(": ")[1]
        for head in mill.heads
        for line in head.splitlines()
        if line.lower().startswith("idempotency-key")
    }


async def test_a_start_is_repeated_under_one_key_until_it_is_answered() -> None:
    mill = Mill(
        [
            None,
            _answer("503 Unavailable", b"{}", "Retry-After: 0"),
            _answer("202 Accepted", RUN),
        ]
    )
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        run = await pond.runs.start("f")
    assert run.state == "queued"
    assert len(mill.heads) == 3
    assert len(_keys(mill)) == 1, "every repeat carries the key of the first"


async def test_two_starts_have_two_keys() -> None:
    mill = Mill([_answer("202 Accepted", RUN), _answer("202 Accepted", RUN)])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        await pond.runs.start("f")
        await pond.runs.start("f")
    assert len(_keys(mill)) == 2


async def test_a_decision_whose_answer_was_lost_is_not_sent_again() -> None:
    mill = Mill([None])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        with pytest.raises(Unavailable) as caught:
            await pond.inputs.resolve("018f0000-0000-7000-8000-000000000000", answer=True)
    assert caught.value.code == "connection_broken"
    assert len(mill.heads) == 1


async def test_a_final_refusal_is_not_repeated() -> None:
    mill = Mill([_answer("422 Unprocessable", b'{"detail": "no", "code": "invalid_input"}')])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        with pytest.raises(InvalidRequest, match="no"):
            await pond.runs.start("f")
    assert len(mill.heads) == 1


async def test_what_is_no_millpond_server_is_said() -> None:
    mill = Mill([_answer("200 OK", b"<html>")])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        with pytest.raises(ApiError, match="Millpond server"):
            await pond.flows.get("echo")


def _event(number: int, kind: str) -> bytes:
    data = (
        f'{{"run_id":"018f0000-0000-7000-8000-000000000000","id":{number},"kind":"{kind}",'
        '"data":{},"at":"2026-01-01T00:00:00Z"}'
    )
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n".encode()


async def test_a_broken_stream_is_resumed_after_the_last_event() -> None:
    kind = "Content-Type: text/event-stream"
    first = _event(1, "run.queued") + _event(2, "run.started")
    cut = _answer("200 OK", first + b"id: 3\nev", kind)
    rest = _answer("200 OK", _event(2, "run.started") + _event(3, "run.succeeded"), kind)
    mill = Mill([cut, rest])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        events = [event.id async for event in pond.follow("018f0000-0000-7000-8000-000000000000")]
    assert events == [1, 2, 3]
    assert "last-event-id: 2" in mill.heads[1].lower()


async def test_a_decision_is_sent_again_only_when_the_server_rolled_it_back() -> None:
    lost = _answer("503 Unavailable", b'{"code": "unavailable"}', "Retry-After: 0")
    mill = Mill([_answer("503 Unavailable", b'{"code": "transient"}', "Retry-After: 0"), lost])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        with pytest.raises(Unavailable) as caught:
            await pond.inputs.resolve("018f0000-0000-7000-8000-000000000000", answer=True)
    assert caught.value.code == "unavailable", "the database may have gone while it committed"
    assert len(mill.heads) == 2


async def test_events_without_ids_are_repeated_under_the_same_ids() -> None:
    mill = Mill([None, _answer("202 Accepted", b'{"data": []}')])
    async with mill.served() as url, AsyncClient(url, patience=QUICK) as pond:
        await pond.events.send_many([{"name": "order.placed"}, {"name": "order.paid"}])
    first, again = mill.bodies
    assert first == again
    assert first.count(b'"id"') == 2


def test_names_are_quoted_in_paths() -> None:
    call = pause_queue("mail/out?x=1")
    assert call.path == "/v1/queues/mail%2Fout%3Fx%3D1/pause"


def test_both_clients_have_the_same_calls() -> None:
    def groups(client: Any) -> dict[str, type]:
        return {name: type(one) for name, one in vars(client).items() if isinstance(one, Group)}

    with Client() as pond:
        assert groups(pond) == groups(AsyncClient())
        assert len(groups(pond)) == 25
    assert _names(Client) == _names(AsyncClient)
    assert _names(Run) == _names(AsyncRun)


def _names(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}
