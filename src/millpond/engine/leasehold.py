"""The leasehold: until when the leases of a worker's session surely stand, as its heartbeat has told.

Made by `worker` for each session, asked before each try of a step. Invariant: it is sure only while no rescue can have
given a lease to somebody else: so long after a renewal was sent as a lease lasts. So a worker that goes on after it was
stopped, or starved, does not call anybody beside the one that has its work by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path

from millpond.engine.heartbeat import Pulse
from millpond.errors import LeaseLost

_AGAIN_S = 0.02
_HOLD_AGAIN_S = 0.005


class Leasehold:
    """The leases of one session; without a pulse they stand for ever."""

    def __init__(self, pulse: Pulse | None = None) -> None:
        self._pulse = pulse

    @property
    def is_sure(self) -> bool:
        """Whether the leases stand at this moment."""
        pulse = self._pulse
        return pulse is None or time.monotonic() < pulse.sure_until

    @property
    def is_gone(self) -> bool:
        """Whether they are known to be no more."""
        return self._pulse is not None and self._pulse.sure_until < 0

    async def until_sure(self) -> None:
        """Wait until the leases are known to stand; raises LeaseLost once they are known to be gone."""
        while not self.is_sure:
            if self.is_gone:
                raise LeaseLost("the worker's session is gone")
            await asyncio.sleep(_AGAIN_S)

    def hold(self, most_s: float) -> None:
        """Keep this process from doing anything until that is known either way, at most so long."""
        if self._pulse is None:
            return
        end_s = time.monotonic() + most_s
        while not (self.is_sure or self.is_gone) and time.monotonic() < end_s:
            self._pulse.tick(time.monotonic())
            time.sleep(_HOLD_AGAIN_S)


def cut_connections() -> None:
    """End all TCP connections of this process, so that nothing goes out on them that is written and not yet sent.

    Event loops send at the end of their turn. Whoever uses such a connection finds it broken, and opens another.
    """
    files = list(Path("/dev/fd").iterdir()) if Path("/dev/fd").is_dir() else []
    for file in files:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(file.name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                one.shutdown(socket.SHUT_RDWR)
