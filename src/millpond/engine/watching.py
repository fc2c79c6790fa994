"""Watching: a worker's look at its own session, and the sign of life that it gives to its heartbeat.

Run by `worker`, in one event loop. Invariants: a session that is gone is told of once it is seen; a lease for which no
attempt stands, at two looks in a row, is handed back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import orjson
import structlog

from millpond.db.pool import EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import heartbeat, remote, waits
from millpond.engine.agenda import let_be_s
from millpond.engine.attempt import Attempt
from millpond.engine.hints import Hints
from millpond.engine.leases import Lease
from millpond.engine.scope import Scope, announce
from millpond.engine.slots import Slots
from millpond.engine.step_attempt import StepAttempt
from millpond.engine.upkeep import tell_readied
from millpond.errors import LeaseLost, MillpondError

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.worker")
_TICK_S = 0.05
_WATCH_S = 1.0
# What is told is stored again after so long, should it have been lost.
_NOTED_S = 30.0


async def tick(
    beat: asyncio.subprocess.Process, pulse: heartbeat.Pulse, scope: Scope, lost: asyncio.Event
) -> None:
    """Tell the heartbeat that the loop runs, and others of long steps; sets `lost` when the heartbeat has ended."""
    loop = asyncio.get_running_loop()
    while beat.returncode is None:
        announce(scope.under_way, loop.time())
        pulse.tick(time.monotonic())
        await asyncio.sleep(_TICK_S)
    lost.set()


class Watch:
    """Looks after one session: `look` asks for it sooner, `lost` is set when the session is gone."""

    def __init__(
        self,
        database: EngineDatabase,
        hints: Hints,
        slots: Slots,
        *,
        worker_id: uuid.UUID,
        attempts: AbstractSet[Attempt | StepAttempt],
        launching: Callable[[], AbstractSet[Lease]],
        look: asyncio.Event,
        lost: asyncio.Event,
    ) -> None:
        self._database = database
        self._hints = hints
        self._slots = slots
        self._worker_id = worker_id
        self._attempts = attempts
        self._launching = launching
        self._look = look
        self._lost = lost
        self._noted: tuple[str, ...] = ()
        self._noted_at = 0.0

    async def run(self) -> None:
        """Notice a lost session, runs that shall stop, and leases that no attempt stands for."""
        suspects: set[Lease] = set()
        whole_at = 0.0
        while True:
            self._look.clear()
            began = time.monotonic()
            try:
                if began < whole_at:
                    await self._watch_known()
                else:
                    try:
                        held = await self._watch()
                    finally:
                        done = time.monotonic()
                        whole_at = done + max(_WATCH_S, let_be_s(done - began))
                    if held is not None:
                        suspects = await self._hand_back(held, suspects)
            except MillpondError as error:
                self._noted_at = 0.0  # what was told last may be lost
                _log.warning("watch.failed", error=error.code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._look.wait()

    async def hand_back_unknown(self, suspects: set[Lease]) -> set[Lease]:
        """Release leases that stood without an attempt before and still do; returns the new ones.

        They come from claims and commits of unknown outcome. With no `suspects` all are new.
        """
        return await self._hand_back(await self._watch() or set(), suspects)

    async def _hand_back(self, held: set[Lease], suspects: set[Lease]) -> set[Lease]:
        known = {one.claimed.lease for one in self._attempts} | self._launching()
        unknown = held - known
        for lease in unknown & suspects:
            _log.warning("lease.handed_back", run_id=str(lease.run_id))
            with contextlib.suppress(LeaseLost):
                give_back = remote.release if lease.is_of_step else waits.release
                tell_readied(
                    self._hints, await give_back(self._database, lease, reason="no attempt")
                )
        return unknown - suspects

    async def _watch(self) -> set[Lease] | None:
        """Tell attempts that shall stop, and others what this worker uses; returns its leases.

        None when the session is over.
        """
        rows = await self._look_at("watch")
        if rows is None:
            return None
        self._unwind([row for row in rows if row["shall_stop"]])
        return {Lease(*row[:5]) for row in rows}

    async def _watch_known(self) -> None:
        """The same for what this worker executes, by its leases' keys."""
        leases = [attempt.claimed.lease for attempt in self._attempts]
        rows = await self._look_at(
            "watch_known", [one.org_id for one in leases], [one.item_id for one in leases]
        )
        self._unwind(rows or [])

    async def _look_at(self, name: str, *args: object) -> list[Record] | None:
        """Return what a look found, None when the session is over; tells others what this worker uses."""
        told = (_json(self._slots.used()), _json(self._slots.told()))
        now = time.monotonic()
        is_news = told != self._noted or now >= self._noted_at + _NOTED_S
        async with self._database.statement("watch") as con:
            rows = await con.fetch(
                _SQL[name], self._worker_id, *args, *(told if is_news else (None, None))
            )
        if not rows:
            self._lost.set()
            return None
        if is_news:
            self._noted, self._noted_at = told, now
        return [row for row in rows if row["item_id"] is not None]

    def _unwind(self, rows: Sequence[Record]) -> None:
        asked = {(row["org_id"], row["item_id"]) for row in rows}
        for attempt in list(self._attempts):
            if (attempt.claimed.lease.org_id, attempt.claimed.lease.item_id) in asked:
                attempt.unwind("cancelled")


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
