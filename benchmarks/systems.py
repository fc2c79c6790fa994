"""The systems that are measured beside each other, and one of them running: its server, its driver.

Called by `suites.pairs`. Invariant: every system gets a fresh server of its own for each pair, of the
same Postgres wheel with the same options, or Debian's Redis without persistence, on a unix socket.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from benchmarks.figures import OURS, OUT
from benchmarks.ground import Server, postgres
from millpond.types import Json

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
READY_S = 60.0
ANSWER_S = 180.0
START_S = 10.0
# An answer is one line: the seconds of up to a few thousand calls.
LINE_BYTES = 2**22
# Runs that A has queued: the same for all, since what is compared is how long B waits behind them.
NOISY = {"noisy": 3_000}


class PeerFailed(Exception):
    """A system did not start, did not answer in time, or ended."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A system that can be measured: its driver, what it stands on, how much of each suite it gets.

    A suite that `counts` does not name is left out for it. Counts are what takes a few seconds.
    """

    name: str
    command: Sequence[str]
    server: str
    counts: Mapping[str, int]
    check: Sequence[str] = field(default=())

    def missing(self) -> str | None:
        """Return why this system cannot be measured here, None when it can."""
        if self.server == "redis" and shutil.which("redis-server") is None:
            return "redis-server is not installed (Debian, Ubuntu: apt-get install redis-server)"
        if shutil.which(self.command[0]) is None:
            return f"{Path(self.command[0]).name} is not there; scripts/peers says what to do"
        if not self.check:
            return None
        tried = subprocess.run([*self.check], cwd=PEERS, capture_output=True, text=True)
        if tried.returncode == 0:
            return None
        said = tried.stderr.strip().splitlines() or ["its packages do not load"]
        return f"{said[-1]}; run scripts/peers"


def _python(name: str, module: str) -> dict[str, Sequence[str]]:
    return {
        "command": [str(PEER_PYTHON), str(PEERS / f"{name}_driver.py")],
        "check": [str(PEER_PYTHON), "-c", f"import {module}"],
    }


SYSTEMS = {
    system.name: system
    for system in (
        System(
            name=OURS,
            command=[sys.executable, "-m", "benchmarks.driver"],
            server="postgres",
            counts={"submit": 400, "bulk": 10_000, "drain": 20_000, "steps": 8_000, "idle": 400}
            | NOISY,
        ),
        System(
            name="pgqueuer",
            server="postgres",
            counts={"submit": 400, "bulk": 10_000, "drain": 20_000, "steps": 1_000, "idle": 400}
            | NOISY,
            **_python("pgqueuer", "pgqueuer, asyncpg, uvloop"),
        ),
        System(
            name="dbos",
            server="postgres",
            counts={"submit": 400, "bulk": 2_000, "drain": 2_000, "steps": 300, "idle": 120}
            | NOISY,
            **_python("dbos", "dbos, psycopg"),
        ),
        System(
            name="celery",
            server="redis",
            counts={"submit": 1_000, "drain": 3_000, "steps": 600, "idle": 400} | NOISY,
            **_python("celery", "celery, redis"),
        ),
        System(
            name="bullmq",
            command=["node", str(PEERS / "bullmq_driver.mjs")],
            check=["node", "--input-type=module", "--eval", "import 'bullmq'; import 'ioredis';"],
            server="redis",
            counts={"submit": 1_000, "bulk": 10_000, "drain": 20_000, "steps": 6_000, "idle": 200}
            | NOISY,
        ),
    )
}


@dataclass
class Running:
    """A system with its server and its driver, ready for orders."""

    system: System
    process: asyncio.subprocess.Process
    server: Server | None

    async def ask(self, order: str, count: int) -> dict[str, Json]:
        """Give an order and wait for its answer; raises PeerFailed."""
        await self._write({"do": order, "count": count})
        return await self._read(ANSWER_S)

    async def begin(self, setup: Mapping[str, Json]) -> None:
        """Tell the driver where its server is and wait until it is ready."""
        await self._write(setup)
        await self._read(READY_S)

    async def settle(self) -> None:
        """Let nothing of this system's work go on while another is measured."""
        if self.server is not None:
            await self.server.settle()

    async def close(self) -> None:
        """End the driver."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(15):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    async def _write(self, line: Mapping[str, Json]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(orjson.dumps(line) + b"\n")
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerFailed(f"{self.system.name} ended; see {log_of(self.system)}") from error

    async def _read(self, limit_s: float) -> dict[str, Json]:
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(limit_s):
                line = await self.process.stdout.readline()
        except TimeoutError as error:
            self.process.kill()
            raise PeerFailed(f"{self.system.name} did not answer in {limit_s:.0f} s") from error
        if not line:
            raise PeerFailed(f"{self.system.name} ended; see {log_of(self.system)}")
        found: dict[str, Json] = orjson.loads(line)
        return found


def log_of(system: System) -> Path:
    """Return the file that a driver's standard error goes to."""
    return OUT / f"{system.name}.log"


@asynccontextmanager
async def run_system(system: System) -> AsyncIterator[Running]:
    """Start a system on a fresh server; everything is gone afterwards."""
    if system.server == "redis":
        async with _redis() as socket, _driver(system, None) as running:
            await running.begin({"redis": str(socket)})
            yield running
        return
    async with postgres() as server, _driver(system, server) as running:
        await running.begin({"urls": asdict(server.urls), "postgres": server.urls.owner})
        yield running


@asynccontextmanager
async def _driver(system: System, server: Server | None) -> AsyncIterator[Running]:
    OUT.mkdir(parents=True, exist_ok=True)
    with log_of(system).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *system.command,
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=LINE_BYTES,
        )
    running = Running(system, process, server)
    try:
        yield running
    finally:
        await running.close()


@asynccontextmanager
async def _redis() -> AsyncIterator[Path]:
    """Start Debian's Redis on a unix socket, without append-only file and without snapshots."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-bench-"))
    socket = folder / "redis.sock"
    options = {
        "--port": "0",
        "--unixsocket": str(socket),
        "--save": "",
        "--appendonly": "no",
        "--dir": str(folder),
        "--logfile": str(folder / "redis.log"),
    }
    words = [word for option in options.items() for word in option]
    process = await asyncio.create_subprocess_exec("redis-server", *words, env=dict(os.environ))
    try:
        async with asyncio.timeout(START_S):
            while not socket.exists():
                await asyncio.sleep(0.01)
        yield socket
    finally:
        process.terminate()
        await process.wait()
        shutil.rmtree(folder, ignore_errors=True)
