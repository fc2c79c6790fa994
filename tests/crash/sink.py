"""The outside world of the crash tests: a server on a unix socket that honours idempotency keys.

Steps call it with their key; it takes effect once per key and remembers every call. It also keeps the
gate at which some runs wait. Invariant: what it remembers is in the test's process, which nobody kills.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

OPEN_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call as it arrived: for which run and effect, under which key, by whom.

    Of a step in another queue, `execution` names which one in its process it is.
    """

    run_id: str
    effect: str
    key: str
    attempt: int
    try_number: int
    pid: int
    is_once: bool = False
    execution: str = ""


@dataclass
class Sink:
    """What arrived, and the gate."""

    path: Path
    calls: list[Call] = field(default_factory=list)
    effects: dict[str, int] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def calls_by_key(self) -> dict[str, list[Call]]:
        """Return the calls of each key in the order of their arrival."""
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.key].append(call)
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request: a call takes effect unless its key has, `wait` waits for the gate."""
        try:
            request = orjson.loads(await reader.readline() or b"null")
            if request == "wait":
                await self.gate.wait()
                answer = 0
            elif request is None:
                return
            else:
                call = Call(**request)
                self.calls.append(call)
                answer = self.effects.setdefault(call.key, len(self.effects))
            writer.write(orjson.dumps(answer) + b"\n")
            await writer.drain()
        except OSError:
            return  # the caller was killed
        finally:
            writer.close()


@asynccontextmanager
async def opened() -> AsyncIterator[Sink]:
    """Serve a sink until the block ends."""
    with tempfile.TemporaryDirectory(prefix="sink-") as folder:
        sink = Sink(Path(folder) / "sock")
        server = await asyncio.start_unix_server(sink.serve, sink.path)
        try:
            yield sink
        finally:
            sink.gate.set()
            server.close()


class SinkClient:
    """The way of steps to the sink; a worker's resource."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def call(self, **what: Any) -> int:
        """Ask for an effect; returns the number of the effect that this key has had."""
        return await self._ask({**what, "pid": os.getpid()})

    async def wait(self) -> None:
        """Wait until the gate is open."""
        await self._ask("wait")

    async def _ask(self, request: Any) -> int:
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(orjson.dumps(request) + b"\n")
            async with asyncio.timeout(OPEN_S):
                line = await reader.readline()
            if not line:
                raise ConnectionError("the sink is gone")
            return int(orjson.loads(line))
        finally:
            writer.close()
