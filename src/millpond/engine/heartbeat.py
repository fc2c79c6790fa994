"""The heartbeat: a process beside the worker that renews its leases while the worker is alive.

Started by the worker; runs as `python -m millpond.engine.heartbeat`. Invariants: it renews only while
its worker's process exists and is not stopped, whether or not the worker's event loop is busy; it
ends a worker whose step has outlived its time limit while the loop is silent for `SILENT_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import orjson

from millpond.db.queries import queries

SILENT_S = 10.0
GONE = 3  # exit status: the worker's session is no more

# What the shared memory holds, each a double: the last tick, the first deadline, until when leases surely stand.
_TICK, _DEADLINE, _SURE = 0, 1, 2
_SIZE = 3 * 8
_GONE = -1.0
_SQL = queries("maintenance")


class Pulse:
    """Shared memory of worker and heartbeat, on CLOCK_MONOTONIC.

    The worker tells its last tick and first deadline, the heartbeat until when the leases surely stand.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._numbers: memoryview[float] | list[float] = memoryview(self._map).cast("d")

    @classmethod
    def make(cls) -> Pulse:
        """Make the memory, backed by a file without a name."""
        with tempfile.TemporaryFile() as file:
            file.truncate(_SIZE)
            return cls(os.dup(file.fileno()))

    def tick(self, now: float) -> None:
        """Store that the loop runs."""
        self._numbers[_TICK] = now

    def expect(self, deadline: float | None) -> None:
        """Store when the first of the running steps is over its time."""
        self._numbers[_DEADLINE] = deadline or 0.0

    def read(self) -> tuple[float, float]:
        """Return last tick and first deadline; 0 means none."""
        return self._numbers[_TICK], self._numbers[_DEADLINE]

    @property
    def sure_until(self) -> float:
        """Until when the leases surely stand; below 0 they are known to be gone, as all of a session that is over."""
        return self._numbers[_SURE]

    def renew(self, until: float) -> None:
        """Store until when the leases surely stand."""
        if not self._map.closed:
            self._numbers[_SURE] = until

    def lose(self) -> None:
        """Store that the leases are gone."""
        self.renew(_GONE)

    def close(self) -> None:
        """Give the memory back."""
        # What stands in its place is for an attempt that outlives the session.
        shared, self._numbers = self._numbers, [0.0, 0.0, _GONE]
        if isinstance(shared, memoryview):
            shared.release()
        self._map.close()
        os.close(self.fd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What a heartbeat needs to know, sent as one JSON line on its standard input."""

    url: str
    worker_id: str
    lease_s: float
    silent_s: float
    pid: int
    fd: int


async def start(
    *, url: str, worker_id: uuid.UUID, lease_s: float, pulse: Pulse, silent_s: float = SILENT_S
) -> asyncio.subprocess.Process:
    """Start the heartbeat of this process; it ends when its standard input closes.

    A step over its time ends the worker once its loop has been silent for `silent_s`.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "millpond.engine.heartbeat",
        stdin=subprocess.PIPE,
        pass_fds=(pulse.fd,),
        start_new_session=True,  # a terminal's Ctrl-C is for the worker, which drains under a heartbeat
    )
    orders = {
        "url": url,
        "worker_id": str(worker_id),
        "lease_s": lease_s,
        "silent_s": silent_s,
        "pid": os.getpid(),
        "fd": pulse.fd,
    }
    assert process.stdin is not None
    process.stdin.write(orjson.dumps(orders) + b"\n")
    await process.stdin.drain()
    return process


def is_stopped_or_gone(pid: int) -> bool:
    """Tell whether a process is stopped (SIGSTOP), a zombie, or no more."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
    else:
        found = subprocess.run(
            ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        state = found.stdout.strip()[:1] or "X"
    return state in "TtZX"


def is_stuck(pulse: Pulse, now: float, silent_s: float = SILENT_S) -> bool:
    """Tell whether a step is over its time while the worker's loop has been silent."""
    tick, deadline = pulse.read()
    return deadline > 0 and now > deadline and now - tick > silent_s


async def _beat(orders: Orders) -> int:
    pulse = Pulse(orders.fd)
    worker_id = uuid.UUID(orders.worker_id)
    con: asyncpg.Connection[asyncpg.Record] | None = None
    closed = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not closed.done():
        await asyncio.wait({closed}, timeout=min(1.5, orders.lease_s / 4))
        if closed.done() or os.getppid() != orders.pid:
            break
        if is_stopped_or_gone(orders.pid):
            continue
        if is_stuck(pulse, time.monotonic(), orders.silent_s):
            print(
                "millpond: a step is over its time and blocks the worker; ending it",
                file=sys.stderr,
            )
            os.kill(orders.pid, signal.SIGKILL)
            break
        try:
            if con is None or con.is_closed():
                con = await asyncpg.connect(
                    orders.url,
                    timeout=3,
                    command_timeout=3,
                    server_settings={"application_name": "millpond-heartbeat"},
                )
            sent = time.monotonic()
            if await con.fetchval(_SQL["beat"], worker_id, orders.lease_s) is None:
                pulse.lose()
                return GONE
            pulse.renew(sent + orders.lease_s)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            if con is not None:
                con.terminate()
            con = None
    return 0


def main() -> None:
    """Read the orders and beat until the worker is gone."""
    with contextlib.suppress(KeyboardInterrupt):
        orders = Orders(**orjson.loads(sys.stdin.readline()))
        status = asyncio.run(_beat(orders))
        sys.stdout.flush()
        # The thread that waits for standard input must not hold the process up.
        os._exit(status)


if __name__ == "__main__":
    main()
