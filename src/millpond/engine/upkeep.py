"""Upkeep: what one worker does for all: rescue, timers, schedules, chores of others' ends, retention.

Run by the worker as loops beside its work. Invariant: a loop outlives every error of the database; it
tells of what it changed after the change is committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from millpond.db.pool import EngineDatabase
from millpond.engine import chores, crossings, deltas, metering, riding
from millpond.engine.deadlines import Expired
from millpond.engine.hints import Hints
from millpond.engine.maintenance import Maintenance
from millpond.engine.meters import Meters
from millpond.engine.quarantine import Quarantine
from millpond.engine.reservations import drop_unlimited
from millpond.engine.retention import Keep, Retention
from millpond.engine.sampling import Sampler
from millpond.engine.throttling import drop_over
from millpond.engine.waits import Readied
from millpond.errors import MillpondError

_log = structlog.get_logger("millpond.upkeep")
_CHORE_S = 0.25
_PRUNE_S = 5.0
# An org has a row written each time that it has used something, so not too often.
_COUNT_S = 3.0
_FORGET_S = 5.0
_FREE_S = 2.5
_METERS_S = 5.0
# It takes the claim's lock.
_CROSSINGS_S = 60.0
_SAMPLE_S = 1.0


class Upkeep:
    """The loops of one worker process."""

    def __init__(
        self, database: EngineDatabase, hints: Hints, quarantine: Quarantine, *, lease_s: float
    ) -> None:
        self._database = database
        self._hints = hints
        self._quarantine = quarantine
        self._lease_s = lease_s

    async def maintain(self) -> None:
        """Rescue, fire timers, start what is due or executed alone; sleeps at most a moment."""
        maintenance = Maintenance(self._database, lease_s=self._lease_s)
        meters, meters_at = Meters(self._database), 0.0
        rescue_at = crossings_at = 0.0
        while True:
            pause_s = _CHORE_S
            try:
                if time.monotonic() >= rescue_at:
                    tell_readied(self._hints, await maintenance.rescue())
                    rescue_at = time.monotonic() + self._lease_s / 8
                tell_readied(self._hints, await maintenance.fire())
                _tell_expired(self._hints, await maintenance.expire())
                tell_readied(self._hints, await maintenance.start_due())
                if time.monotonic() >= meters_at:
                    await meters.sweep()
                    await drop_over(self._database)
                    await drop_unlimited(self._database)
                    await riding.sweep(self._database)
                    meters_at = time.monotonic() + _METERS_S
                if time.monotonic() >= crossings_at:
                    await crossings.drop_over(self._database)
                    crossings_at = time.monotonic() + _CROSSINGS_S
                await self._quarantine.look()
                due_s = await maintenance.next_due_s()
                if due_s is not None:
                    # One that is due and was not taken has its run locked by somebody: a moment.
                    pause_s = min(pause_s, due_s) if due_s > 0 else pause_s / 5
            except MillpondError as error:
                _log.warning("maintenance.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def free(self) -> None:
        """End sessions that keep locks for clients that are gone; beside all that may wait for these locks."""
        maintenance = Maintenance(self._database, lease_s=self._lease_s)
        while True:
            try:
                await maintenance.free_claim()
            except MillpondError as error:
                _log.warning("freeing.failed", error=error.code)
            await asyncio.sleep(_FREE_S)

    async def carry_out(self) -> None:
        """Do to runs what the ends of others asked for, apart from timers, which do not wait."""
        while True:
            pause_s = _CHORE_S
            try:
                done = await chores.carry_out(self._database)
                self._hints.cancelled(done.cancelled)
                self._hints.changed(done.cancelled)
                tell_readied(self._hints, done.readied)
                pause_s = 0.0 if done.has_more else _CHORE_S
            except MillpondError as error:
                _log.warning("chores.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def count(self) -> None:
        """Add what runs used to their days."""
        while True:
            pause_s = _COUNT_S
            try:
                pause_s = 0.0 if await metering.fold(self._database) else _COUNT_S
            except MillpondError as error:
                _log.warning("metering.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def sample(self) -> None:
        """Add up for how long limits and queues are full."""
        sampler = Sampler(self._database)
        while True:
            try:
                await sampler.sample()
            except MillpondError as error:
                _log.warning("sampling.failed", error=error.code)
            await asyncio.sleep(_SAMPLE_S)

    async def forget(self) -> None:
        """Remove what steps showed while they went on, once they are over."""
        while True:
            pause_s = _FORGET_S
            try:
                pause_s = 0.0 if await deltas.forget(self._database) else _FORGET_S
            except MillpondError as error:
                _log.warning("deltas.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def prune(self, keep: Keep) -> None:
        """Delete what has been over for long, a little at a time."""
        retention = Retention(self._database, keep)
        while True:
            pause_s = _PRUNE_S
            try:
                pause_s = await retention.sweep()
            except MillpondError as error:
                _log.warning("retention.failed", error=error.code)
            await asyncio.sleep(pause_s)


def tell_readied(hints: Hints, readied: Sequence[Readied]) -> None:
    """Hint the queues of runs that may go on, and whoever follows them."""
    if readied:
        hints.wake({one.queue for one in readied})
        hints.changed(one.run_id for one in readied)


def _tell_expired(hints: Hints, expired: Expired) -> None:
    if expired.told:
        hints.cancelled(expired.told)
    if expired.ended or expired.told:
        hints.changed([*expired.ended, *expired.told])
    tell_readied(hints, expired.readied)
