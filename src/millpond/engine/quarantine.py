"""Quarantine: work under which workers died twice is executed alone, in a process of its own.

Looked at by the chores of every worker that may start such processes. Invariants: one process at a time
for each worker, and one work item in it; the process has a session and a heartbeat of its own, and
drains when the worker that started it is gone (its standard input closes).
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Sequence

import structlog

from millpond.engine.lanes import ALONE

_log = structlog.get_logger("millpond.quarantine")
_LOOK_S = 1.0
_MAX_LOOK_S = 30.0


def alone(capabilities: Sequence[str]) -> list[str]:
    """Name the abilities to execute these alone."""
    return [f"{one}{ALONE}" for one in capabilities]


class Quarantine:
    """Starts a process by `command` where work waits in `queues` that this worker's flows have to do alone.

    `abilities` are what such work names.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        capabilities: Sequence[str],
        queues: Sequence[str],
    ) -> None:
        self._command = list(command)
        self.abilities = alone(capabilities)
        self.queues = list(queues)
        self._process: asyncio.subprocess.Process | None = None
        self._look_at = 0.0
        self._pause_s = _LOOK_S
        self._is_closing = False

    def asks(self, now: float) -> bool:
        """Whether it would start a process if there is work for one; once a second at most."""
        if self._is_closing or not self._command or self._is_busy() or now < self._look_at:
            return False
        self._look_at = now + self._pause_s
        return True

    async def start(self) -> None:
        """Start a process: there is work for one."""
        if self._is_closing or self._is_busy():
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, start_new_session=True
        )
        _log.warning("quarantine.started", pid=self._process.pid)

    def _is_busy(self) -> bool:
        """Whether a process is at work; one that found nothing to do makes the next look wait longer."""
        if self._process is None:
            return False
        code = self._process.returncode
        if code is None:
            return True
        _log.info("quarantine.ended", pid=self._process.pid, exit_code=code)
        self._process = None
        self._pause_s = min(2 * self._pause_s, _MAX_LOOK_S) if code > 0 else _LOOK_S
        if code > 0:
            self._look_at = time.monotonic() + self._pause_s
        return False

    def drain(self) -> None:
        """Ask the process to hand back what does not end in time; none is started any more."""
        self._is_closing = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def close(self, timeout_s: float) -> None:
        """Wait for the process to end. It is never killed: that would count against its run."""
        self.drain()
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            _log.warning("quarantine.left", pid=self._process.pid)
