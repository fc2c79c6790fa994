"""A provider's far end on a real socket: answers as scripted and counts what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """One scripted answer; `cut_after` closes the connection after that many bytes of the body.

    With `chunks` the body is a stream of server-sent events, as text.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    hang: bool = False
    chunks: list[str] | None = None


@dataclass
class Far:
    """The far end: where it listens, what it says next, what it was asked."""

    port: int
    replies: list[Reply]
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def _read(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return first.split()[1], headers, json.loads(body or b"null")


@asynccontextmanager
async def far_end(*replies: Reply) -> AsyncIterator[Far]:
    """Serve `replies` in order, the last one again and again."""
    far = Far(0, list(replies))
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                far.requests.append(await _read(reader))
                reply = far.replies.pop(0) if len(far.replies) > 1 else far.replies[0]
                if reply.hang:
                    await gone.wait()
                    return
                body = json.dumps(reply.body).encode()
                kind = "application/json"
                if reply.chunks is not None:
                    body, kind = "".join(reply.chunks).encode(), "text/event-stream"
                headers = {"content-type": kind, **reply.headers}
                headers["content-length"] = str(len(body))
                head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
                writer.write(f"HTTP/1.1 {reply.status} X\r\n{head}\r\n".encode())
                writer.write(body[: reply.cut_after])
                await writer.drain()
                if reply.cut_after is not None:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    far.port = server.sockets[0].getsockname()[1]
    try:
        yield far
    finally:
        gone.set()
        server.close()
