"""Claiming: a session's claims, one after the other, and what each has to be told.

Run by `worker`. Invariants: a claim asks for slots that are free as it begins; after the session's end nothing more is
claimed, and what was is started or left to the watch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import Any

import structlog

from millpond.engine.admission import Terms
from millpond.engine.attempt import Attempt
from millpond.engine.claim import Claimer
from millpond.engine.launching import Launcher
from millpond.engine.leases import Claimed
from millpond.engine.riding import Riding
from millpond.engine.slots import Slots
from millpond.engine.step_attempt import StepAttempt
from millpond.engine.throttling import Throttling
from millpond.errors import LeaseLost, MillpondError

_log = structlog.get_logger("millpond.worker")
_BUSY_POLL_S = 0.1
_IDLE_POLL_S = 1.0


class Claims:
    """Claims for one session until `stopping` is set; sets `lost` where that is found gone.

    `attempts` are the worker's under way, `tasks` theirs. `has_worked`: whether what it claimed to be executed alone
    was started.
    """

    def __init__(
        self,
        claimer: Claimer,
        slots: Slots,
        *,
        launcher: Launcher,
        riding: Riding,
        throttling: Throttling,
        stopping: asyncio.Event,
        lost: asyncio.Event,
        attempts: Collection[Attempt | StepAttempt],
        tasks: Collection[asyncio.Task[None]],
    ) -> None:
        self._claimer = claimer
        self._slots = slots
        self._launcher = launcher
        self._riding = riding
        self._throttling = throttling
        self._stopping = stopping
        self._lost = lost
        self._attempts = attempts
        self._tasks = tasks
        self.has_worked = False

    async def all(self) -> None:
        """Claim whenever there is room and reason; polls as a net below the hints.

        What a claim brought is started beside the next claim, so that worker and database both have work.
        """
        self._riding.attach(self._claimer)
        stopping = asyncio.create_task(self._stopping.wait())
        at_once = False
        try:
            async with self._claimer.one_by_one(self._slots.has_beyond):
                while not self._stopping.is_set():
                    if not await self._next(stopping):
                        return
        except asyncio.CancelledError:
            at_once = True
            raise
        finally:
            stopping.cancel()
            await self._launcher.close(at_once=at_once)

    async def _next(self, stopping: asyncio.Task[bool]) -> bool:
        """Claim once there is room, and wait where there was no more; returns whether the session goes on."""
        self._launcher.check()
        wanted = self._slots.wanted()
        if not wanted and not self._riding.asks():
            await self._claimer.rest()
            await first(self._slots.room(), self._riding.some(), also=[stopping])
            return True
        terms = self._slots.terms(wanted)
        self._slots.expect()
        asks = self._riding.asks()
        try:
            claimed, has_more = await self._claimer.claim(wanted, terms, asks)
        except LeaseLost:
            self._lost.set()
            return False
        except MillpondError as error:
            # What it may have leased is found by the watch and handed back.
            _log.warning("claim.failed", error=error.code)
            await asyncio.sleep(0.5)
            return True
        self._tell(wanted, claimed, terms)
        if asks:
            # Who has no room parks before the next claim asks for it, under what its bound leaves.
            await asyncio.sleep(0)
        if not has_more and not self._slots.is_awoken:
            await self._claimer.rest()
            is_busy = bool(claimed or self._attempts)
            poll_s = _BUSY_POLL_S if is_busy else _IDLE_POLL_S
            await self._slots.wait(self._claimer.limits.poll_s(poll_s, _BUSY_POLL_S))
        return True

    def _tell(self, wanted: Mapping[str, int], claimed: Sequence[Claimed], terms: Terms) -> None:
        """Launch what a claim brought, and tell others what it saw."""
        if claimed:
            self._launcher.launch(claimed, self._claimer.expected)
        self._riding.tell(self._claimer)
        self._slots.note_claim(wanted, claimed, terms)
        self._slots.note_awaited(self._claimer.limits.awaited)
        self._throttling.watch(self._claimer.limits.opened)

    async def one(self) -> None:
        """Claim one work item that is executed alone, and wait until its attempt is over."""
        self._riding.attach(self._claimer)
        try:
            for queue in self._slots.total:
                claimed, _ = await self._claimer.claim({queue: 1})
                if claimed:
                    self.has_worked = await self._launcher.launch(claimed) > 0
                    break
        except MillpondError as error:
            # What it may have leased is handed back as the session ends.
            _log.warning("claim.failed", error=error.code)
        if self._tasks:
            await first(self._stopping.wait(), self._riding.serve(), also=list(self._tasks))


async def first(*starts: Awaitable[object], also: Sequence[asyncio.Task[Any]] = ()) -> None:
    """Wait until one of these ends; those begun here are ended."""
    tasks = [asyncio.ensure_future(one) for one in starts]
    try:
        await asyncio.wait([*tasks, *also], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
