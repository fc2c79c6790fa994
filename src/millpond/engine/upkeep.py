"""Upkeep: what one worker does for all: rescue, timers, schedules, chores of others' ends, retention.

Run by the worker as loops beside its work. Invariants: a loop outlives every error of the database; it tells of what
it changed after the change is committed; where nothing is to be done, one look tells all of them so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import structlog

from millpond.db.pool import EngineDatabase
from millpond.engine import chores, crossings, deltas, metering, riding
from millpond.engine.agenda import Question, Task, Todo, let_be_s, look
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
_LOOK_S = 0.25
_PRUNE_S = 5.0
# An org has a row written each time that it has used something, so not too often.
_COUNT_S = 10.0
# Quotas go by what was spent on models.
_SPENT_S = 3.0
# How often either is looked for where there was none.
_USAGE_S = 0.5
# For each worker that looks, counting so many of them at most: all others may stand still.
_FREE_S = 2.5
_FREEING = 2
_RARE_S = 5.0
# It takes the claim's lock.
_CROSSINGS_S = 60.0
_SAMPLE_S = 1.0
# Who finds that another process sampled leaves it to that one for longer.
_SAMPLED_S = 2.0
_MAINTAINED: AbstractSet[Task] = frozenset(
    (
        *("dead", "timers", "schedules", "groups", "suspects"),
        *("meters", "brakes", "tokens", "lines", "crossings"),
    )
)
_CHORES: AbstractSet[Task] = frozenset(("chores",))
# What is done also where nobody could look; it does nothing where there is nothing.
_UNSEEN: AbstractSet[Task] = frozenset(("dead", "timers", "schedules", "groups", "chores"))
_USAGE: AbstractSet[Task] = frozenset(("spent", "usage"))
_DELTAS: AbstractSet[Task] = frozenset(("deltas",))


class Upkeep:
    """The loops of one worker process."""

    def __init__(
        self, database: EngineDatabase, hints: Hints, quarantine: Quarantine, *, lease_s: float
    ) -> None:
        self._database = database
        self._hints = hints
        self._quarantine = quarantine
        self._lease_s = lease_s
        self._maintenance = Maintenance(database, lease_s=lease_s)
        self._meters = Meters(database)
        self._todo = Todo()
        self._crossings_at = 0.0
        self._workers = 1

    async def look(self) -> None:
        """Look what there is to be done, sooner where a timer is due before; sleeps at most a moment."""
        dead_at = orphans_at = rare_at = spent_at = usage_at = 0.0
        while True:
            pause_s = _LOOK_S
            now = time.monotonic()
            asks_alone = self._quarantine.asks(now)
            question = Question(
                dead=now >= dead_at,
                orphans=now >= orphans_at,
                rare=now >= rare_at,
                spent=now >= spent_at,
                usage=now >= usage_at,
                abilities=self._quarantine.abilities if asks_alone else None,
                queues=self._quarantine.queues if asks_alone else None,
            )
            try:
                seen = await look(self._database, question)
                self._maintenance.note(seen.now, seen.uptime_s)
                self._todo.add(seen.todo)
                self._workers = seen.workers or self._workers
                dead_at = now + self._lease_s / 8 if question.dead else dead_at
                rare_at = now + _RARE_S if question.rare else rare_at
                if question.spent:
                    spent_at = now + (_SPENT_S if "spent" in seen.todo else _USAGE_S)
                if question.usage:
                    usage_at = now + (_COUNT_S if "usage" in seen.todo else _USAGE_S)
                if seen.due_s is not None:
                    # One that is due and was not taken has its run locked by somebody: a moment.
                    pause_s = min(pause_s, seen.due_s) if seen.due_s > 0 else pause_s / 5
            except (MillpondError, TimeoutError) as error:
                _log.warning("looking.failed", error=getattr(error, "code", "timeout"))
                # What made it fail may be a table that only some of this needs.
                self._todo.add(_UNSEEN)
                seen = None
            if question.orphans:
                done = time.monotonic()
                orphans_at = done + self._lease_s / 8 + let_be_s(done - now)
            if seen is not None and "dead" in seen.todo:
                # There may be more than are given back at once.
                orphans_at = time.monotonic() + self._lease_s / 8
            await asyncio.sleep(pause_s)

    async def maintain(self) -> None:
        """Rescue, fire timers, start what is due or executed alone."""
        while True:
            todo = await self._todo.take(_MAINTAINED)
            try:
                await self._maintain(todo)
            except MillpondError as error:
                _log.warning("maintenance.failed", error=error.code)

    async def _maintain(self, todo: AbstractSet[Task]) -> None:
        maintenance, now = self._maintenance, time.monotonic()
        if "dead" in todo:
            tell_readied(self._hints, await maintenance.rescue())
        if "timers" in todo:
            tell_readied(self._hints, await maintenance.fire())
            _tell_expired(self._hints, await maintenance.expire())
        if "schedules" in todo:
            tell_readied(self._hints, await maintenance.start_due())
        if "groups" in todo:
            tell_readied(self._hints, await maintenance.lapse())
        if "meters" in todo:
            await self._meters.sweep()
        if "brakes" in todo:
            await drop_over(self._database)
        if "tokens" in todo:
            await drop_unlimited(self._database)
        if "lines" in todo:
            await riding.sweep(self._database)
        if "crossings" in todo and now >= self._crossings_at:
            await crossings.drop_over(self._database)
            self._crossings_at = now + _CROSSINGS_S
        if "suspects" in todo:
            await self._quarantine.start()

    async def free(self) -> None:
        """End sessions that keep locks for clients that are gone; beside all that may wait for these locks."""
        while True:
            try:
                await self._maintenance.free_claim()
            except MillpondError as error:
                _log.warning("freeing.failed", error=error.code)
            await asyncio.sleep(_FREE_S * min(_FREEING, self._workers))

    async def carry_out(self) -> None:
        """Do to runs what the ends of others asked for, apart from timers, which do not wait."""
        while True:
            await self._todo.take(_CHORES)
            try:
                done = await chores.carry_out(self._database)
                self._hints.cancelled(done.cancelled)
                self._hints.changed(done.cancelled)
                tell_readied(self._hints, done.readied)
                if done.has_more:
                    self._todo.add(_CHORES)
            except MillpondError as error:
                _log.warning("chores.failed", error=error.code)

    async def count(self) -> None:
        """Add what runs used to their days."""
        while True:
            todo = await self._todo.take(_USAGE)
            try:
                while await metering.fold(self._database, only_spent="usage" not in todo):
                    pass
            except MillpondError as error:
                _log.warning("metering.failed", error=error.code)

    async def sample(self) -> None:
        """Add up for how long limits and queues are full."""
        sampler = Sampler(self._database)
        while True:
            pause_s = _SAMPLE_S
            try:
                pause_s = _SAMPLE_S if await sampler.sample() else _SAMPLED_S
            except MillpondError as error:
                _log.warning("sampling.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def forget(self) -> None:
        """Remove what steps showed while they went on, once they are over."""
        while True:
            await self._todo.take(_DELTAS)
            try:
                while await deltas.forget(self._database):
                    pass
            except MillpondError as error:
                _log.warning("deltas.failed", error=error.code)

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
