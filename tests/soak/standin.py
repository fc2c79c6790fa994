"""A stand-in for a provider: a process on loopback that counts what is in flight and what arrives, by key.

Run as `python -m tests.soak.standin`; prints its port. `POST /calls` with `{"keys": […], "for_s": 0.1}` is answered
after that time, `GET /record` tells what was counted. Invariants: it knows of no limit; its clock is its own
(`time.monotonic`); a call is in flight from the moment at which its request was read until just before its answer is
written, or until its connection is gone.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson


@dataclass
class Tally:
    """The calls of one key: when each arrived, and how many were in flight then, with it."""

    at_s: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    now: int = 0
    aborted: int = 0


class Counter:
    """Counts calls by their keys."""

    def __init__(self) -> None:
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def enter(self, keys: list[str]) -> None:
        """Count a call in."""
        at_s = time.monotonic()
        for key in keys:
            tally = self.tallies[key]
            tally.now += 1
            tally.at_s.append(at_s)
            tally.in_flight.append(tally.now)

    def leave(self, keys: list[str], *, is_aborted: bool) -> None:
        """Count a call out."""
        for key in keys:
            self.tallies[key].now -= 1
            self.tallies[key].aborted += is_aborted

    def record(self) -> dict[str, Any]:
        """Return all that was counted."""
        return {key: asdict(tally) for key, tally in self.tallies.items()}


class Connection(asyncio.Protocol):
    """One connection, with one request."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._read = b""
        self._keys: list[str] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Read a request; the moment at which it is whole is that of its arrival."""
        self._read += data
        head, has_body, body = self._read.partition(b"\r\n\r\n")
        if not has_body or len(body) < _length(head):
            return
        if head.startswith(b"GET /record "):
            self._answer(orjson.dumps(self._counter.record()))
            return
        call = orjson.loads(body)
        self._keys = call["keys"]
        self._counter.enter(call["keys"])
        asyncio.get_running_loop().call_later(call["for_s"], self._done)

    def connection_lost(self, error: Exception | None) -> None:
        """Count out a call whose caller is gone."""
        self._end(is_aborted=True)

    def _done(self) -> None:
        if self._keys is not None:
            self._end(is_aborted=False)
            self._answer(b"{}")

    def _end(self, *, is_aborted: bool) -> None:
        keys, self._keys = self._keys, None
        if keys is not None:
            self._counter.leave(keys, is_aborted=is_aborted)

    def _answer(self, body: bytes) -> None:
        assert self._transport is not None
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._transport.write(head.encode() + body)
        self._transport.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def main() -> None:
    """Serve until standard input closes."""
    counter, loop = Counter(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(counter), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
