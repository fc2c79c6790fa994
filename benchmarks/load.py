"""The load: requests over kept connections, one after the other on each, sent by a process of its own.

Run by the suite `accept` as `python -m benchmarks.load`. Standard input: one JSON line for each turn, answered by
one line with what it found. Invariants: a request is sent only when its connection has the whole answer to the one
before; an answer that is not 202 ends the turn; its own share of a core is told, since it must not be what is
measured.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import orjson

from benchmarks.figures import percentile
from benchmarks.ground import quiet
from millpond.cli.loop import run_loop

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_ACCEPTED = b"HTTP/1.1 202"
_ANSWER_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a turn came to: requests per second, latencies in seconds, the load's own share of a core."""

    rate: float
    p50_s: float
    p99_s: float
    core_share: float


@dataclass
class _Turn:
    """One turn: what is sent, and what came of it since the clock runs."""

    request: bytes
    stopped: asyncio.Future[None]
    is_measured: bool = False
    is_over: bool = False
    took_s: list[float] = field(default_factory=list)

    def fail(self, why: str) -> None:
        """End the turn."""
        if not self.stopped.done() and not self.is_over:
            self.stopped.set_exception(RuntimeError(why))


class _Connection(asyncio.Protocol):
    """One kept connection: sends again whenever its answer is whole, closes when its turn is over."""

    def __init__(self, turn: _Turn) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turn = turn
        self._buffer = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._buffer = self._buffer + data if self._buffer else data
        head = self._buffer.find(_END)
        if head < 0 or len(self._buffer) < head + len(_END) + _length(self._buffer, head):
            return
        took_s = time.perf_counter() - self._sent_at
        if not self._buffer.startswith(_ACCEPTED):
            self._turn.fail(f"not accepted: {self._buffer[:400]!r}")
            return
        if self._turn.is_measured:
            self._turn.took_s.append(took_s)
        self._buffer = b""
        if self._turn.is_over:
            assert self._transport is not None
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the turn if it was not over."""
        self._turn.fail("the server closed a connection")
        self.closed.set_result(None)

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        self._transport.write(self._turn.request)


def _length(answer: bytes, head: int) -> int:
    at = answer.lower().find(_LENGTH, 0, head)
    return int(answer[at + len(_LENGTH) : answer.find(b"\r", at)])


def request_of(path: str, token: str, body: bytes) -> bytes:
    """Return a POST with a bearer token and a JSON body, as it goes over the wire."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {token}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + _END + body


async def _measure(order: Mapping[str, str | int | float]) -> dict[str, float]:
    """Send for the warm-up and then for the time asked for."""
    loop = asyncio.get_running_loop()
    request = request_of(str(order["path"]), str(order["token"]), str(order["body"]).encode())
    turn = _Turn(request, loop.create_future())
    made = [
        await loop.create_connection(lambda: _Connection(turn), "127.0.0.1", int(order["port"]))
        for _ in range(int(order["connections"]))
    ]
    await _for(turn, float(order["warm_s"]))
    began, used_s = time.perf_counter(), time.process_time()
    turn.is_measured = True
    await _for(turn, float(order["seconds"]))
    turn.is_measured = False
    took_s, used_s = time.perf_counter() - began, time.process_time() - used_s
    turn.is_over = True
    async with asyncio.timeout(_ANSWER_S):
        await asyncio.gather(*(connection.closed for _, connection in made))
    if not turn.took_s:
        raise RuntimeError(f"nothing was answered in {took_s:.1f} s")
    return {
        "rate": len(turn.took_s) / took_s,
        "p50_s": percentile(turn.took_s, 0.5),
        "p99_s": percentile(turn.took_s, 0.99),
        "core_share": used_s / took_s,
    }


async def _for(turn: _Turn, seconds: float) -> None:
    """Wait; raises what ended the turn early."""
    done, _ = await asyncio.wait([turn.stopped], timeout=seconds)
    for ended in done:
        ended.result()


@dataclass(frozen=True)
class Loader:
    """The running load."""

    process: asyncio.subprocess.Process

    async def turn(
        self, *, port: int, path: str, token: str, body: bytes, connections: int, seconds: float
    ) -> Load:
        """Measure one turn."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {
            "port": port,
            "path": path,
            "token": token,
            "body": body.decode(),
            "connections": connections,
            "seconds": seconds,
            "warm_s": min(1.0, seconds / 4),
        }
        self.process.stdin.write(orjson.dumps(order) + b"\n")
        await self.process.stdin.drain()
        async with asyncio.timeout(seconds + _ANSWER_S):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the load ended; what it says is above")
        return Load(**orjson.loads(line))


@asynccontextmanager
async def loader() -> AsyncIterator[Loader]:
    """Run the load's process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.load",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Loader(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def serve() -> None:
    """Answer turns until standard input closes."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        found = await _measure(orjson.loads(line))
        print(orjson.dumps(found).decode(), flush=True)


if __name__ == "__main__":
    quiet()
    run_loop(serve())
