"""Children of `millpond up`: started, watched, started again when they die, ended in order.

Called by `platform`. Invariants: a child never outlives its parent (it watches a pipe that closes
with the parent); a child that cannot start at all is given up on instead of being tried for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

import structlog

from millpond.cli.exit import ExitCode
from millpond.errors import MillpondError, Permanent, Unavailable

_log = structlog.get_logger("millpond.up")

_FIRST_DELAY_S = 0.25
_LAST_DELAY_S = 10.0
_STEADY_S = 30.0
_EARLY_DEATHS_MAX = 5
# A child that ends with one of these says itself that trying again cannot help.
_HOPELESS = frozenset({ExitCode.USAGE, ExitCode.DENIED, ExitCode.CONFLICT})


@dataclass(kw_only=True)
class Child:
    """One process to keep alive: `millpond <arguments>` with this environment.

    `grace_s` is how long it may take to end after SIGTERM before it is killed; children of one `stage`
    end together, lower stages first.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    grace_s: float
    descriptors: Sequence[int] = ()
    stage: int = 0
    process: asyncio.subprocess.Process | None = None
    deaths: int = 0
    is_ending: bool = False

    @property
    def pid(self) -> int | None:
        """The process id, while it lives."""
        if self.process is None or self.process.returncode is not None:
            return None
        return self.process.pid


@dataclass(kw_only=True)
class Supervisor:
    """Keeps children alive until `end`; `failed` is set to the reason when one is given up on."""

    log_file: IO[bytes] | None = None
    failed: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    _pipe: tuple[int, int] = field(default_factory=os.pipe)
    _watchers: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _children: list[Child] = field(default_factory=list)

    async def start(self, child: Child) -> None:
        """Start a child and keep it alive from now on."""
        self._children.append(child)
        await self._spawn(child)
        watcher = asyncio.create_task(self._watch(child), name=f"watch {child.name}")
        self._watchers[child.name] = watcher

    async def end(self) -> None:
        """End the children, stage after stage: SIGTERM, then SIGKILL after their grace."""
        for child in self._children:
            child.is_ending = True
        for stage in sorted({child.stage for child in self._children}):
            ending = [child for child in self._children if child.stage == stage]
            await asyncio.gather(*(_end(child) for child in ending))
            for child in ending:
                await _cancelled(self._watchers.pop(child.name, None))
        for descriptor in self._pipe:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def kill(self) -> None:
        """Kill every child at once."""
        for child in self._children:
            child.is_ending = True
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    def raise_if_failed(self) -> None:
        """Raise what made a child be given up on, if one was."""
        if self.failed.done():
            raise Permanent(self.failed.result(), advice="The log above tells why.")

    async def _spawn(self, child: Child) -> None:
        watched, _ = self._pipe
        command = [sys.executable, "-m", "millpond.cli", *child.arguments]
        command += ["--parent-fd", str(watched)]
        try:
            child.process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(child.environment),
                stdin=subprocess.DEVNULL,
                stdout=self.log_file,
                stderr=self.log_file,
                pass_fds=[watched, *child.descriptors],
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"{child.name} cannot be started: {error}") from error
        _log.info("child_started", child=child.name, pid=child.pid)

    async def _watch(self, child: Child) -> None:
        """Start the child again whenever it ends by itself, a little later each time."""
        delay_s, early_deaths = _FIRST_DELAY_S, 0
        while True:
            assert child.process is not None
            began = time.monotonic()
            code = await child.process.wait()
            if child.is_ending:
                return
            child.deaths += 1
            _log.warning("child_ended", child=child.name, exit_code=code, restart_in_s=delay_s)
            is_early = time.monotonic() - began < _STEADY_S
            # One that a signal ended had started: a run may have killed it, which quarantine is for.
            early_deaths = early_deaths + (code >= 0) if is_early else 0
            if code in _HOPELESS or early_deaths >= _EARLY_DEATHS_MAX:
                self._give_up(f"{child.name} does not stay up (exit code {code})")
                return
            delay_s = delay_s if is_early else _FIRST_DELAY_S
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LAST_DELAY_S)
            try:
                await self._spawn(child)
            except MillpondError as error:
                self._give_up(f"{child.name} cannot be started: {error.message}")
                return

    def _give_up(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)


async def _end(child: Child) -> None:
    process = child.process
    if process is None or process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(child.grace_s):
            await process.wait()
    except TimeoutError:
        _log.warning("child_killed", child=child.name, grace_s=child.grace_s)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task is None:
        return
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
