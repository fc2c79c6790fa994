"""Server-sent events: a run's events as a stream that resumes by number, those of all runs by their place.

Called by the events routes. Invariants: every event goes out once and in order with `id:` = its
number or place, text of steps under way between them without one; a stream ends after the final event, when the
client has gone, when the server stops, or with a message `closed` when the caller's token has expired or what it may
has changed; whatever ends it, nothing of it is left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from fastapi import Response
from starlette.types import Receive, Scope, Send

from millpond.api.reply import encode
from millpond.api.shapes import delta_json, event_json, org_event_json
from millpond.engine.events import Event
from millpond.engine.feeds import OrgEvent
from millpond.engine.growing import Delta
from millpond.errors import NotFound, Transient

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
# So often an open stream asks whether its caller may still see it.
CHECK_S = 5.0
_RETRY_MS = 1000  # how long a client waits before it comes back
_HEADERS = {
    "Content-Type": MEDIA_TYPE,
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
_log = structlog.get_logger("millpond.api.sse")

Told = Event | Delta | OrgEvent
# Opens what is told after a number or place.
Open = Callable[[Any], AsyncIterator[Told]]
IsOver = Callable[[], Awaitable[str | None]]


class EventStream(Response):
    """Streams events until the final one; `open_from` opens the tail after a number.

    `ends_at` is when the caller's token ends, in seconds since the epoch; None where the database knows that alone.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        open_from: Open,
        *,
        after: object,
        stopping: asyncio.Event,
        keep_alive_s: float = KEEP_ALIVE_S,
        is_over: IsOver | None = None,
        ends_at: float | None = None,
        check_s: float = CHECK_S,
    ) -> None:
        super().__init__(None, 200, _HEADERS)
        del self.headers["content-length"]
        self._open_from = open_from
        self._after = after
        self._stopping = stopping
        self._keep_alive_s = keep_alive_s
        self._is_over = is_over
        self._ends_at = ends_at
        self._check_s = check_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it is over for whatever reason."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with asyncio.TaskGroup() as tasks:
            pump = tasks.create_task(self._pump(send), name="sse.pump")
            gone = tasks.create_task(_until_gone(receive), name="sse.gone")
            stop = tasks.create_task(self._stopping.wait(), name="sse.stop")
            watch = tasks.create_task(self._watch(), name="sse.watch")
            every = {pump, gone, stop, watch}
            await asyncio.wait(every, return_when=asyncio.FIRST_COMPLETED)
            is_here = not gone.done()
            last = closed(watch.result()) if watch.done() and not pump.done() else b""
            for task in every:
                task.cancel()
        if is_here:
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _watch(self) -> str:
        """Return why the caller may see no more, once that is so."""
        while True:
            await asyncio.sleep(self._pause_s())
            if self._is_over is not None and (why := await self._is_over()) is not None:
                return why

    def _pause_s(self) -> float:
        """Return how long not to ask: no longer than until the caller's token ends."""
        if self._ends_at is None:
            return self._check_s
        return min(self._check_s, max(self._ends_at - time.time(), 0.0))

    async def _pump(self, send: Send) -> None:
        chunks = self._chunks()
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        opening = b"retry: %d\n" % _RETRY_MS  # goes with the first event: alone it is none
        events = self._events()
        upcoming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait({upcoming}, timeout=self._keep_alive_s)
                if not upcoming.done():
                    yield b": keep-alive\n\n"
                    continue
                event = upcoming.result()
                if event is None:
                    return
                yield opening + frame(event)
                opening = b""
                upcoming = asyncio.ensure_future(anext(events, None))
        finally:
            upcoming.cancel()
            await asyncio.wait({upcoming})
            await events.aclose()

    async def _events(self) -> AsyncGenerator[Told, None]:
        """Yield events, opening the tail again from the last number after a fault that passes."""
        after = self._after
        while True:
            try:
                async for event in self._open_from(after):
                    if isinstance(event, Event):
                        after = event.event_no
                    elif isinstance(event, OrgEvent):
                        after = event.place
                    yield event
                return
            except NotFound:
                return  # removed meanwhile
            except Transient as error:
                _log.warning("sse.interrupted", code=error.code)
                await asyncio.sleep(error.retry_after_s or 1.0)


def closed(why: str) -> bytes:
    """Return the last word of a stream that ends before its run: no event, so it has no number."""
    return b'event: closed\ndata: {"reason":"%s"}\n\n' % why.encode()


def frame(event: Told) -> bytes:
    """Return one event as it goes over the wire; JSON has no line breaks, so one data line does.

    Text of a step under way has no number: whoever resumes does so from an event.
    """
    if isinstance(event, Delta):
        return b"event: delta\ndata: %s\n\n" % encode(delta_json(event))
    if isinstance(event, OrgEvent):
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (
            str(event.place).encode(),
            event.event.kind.encode(),
            encode(org_event_json(event)),
        )
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (
        event.event_no,
        event.kind.encode(),
        encode(event_json(event)),
    )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
