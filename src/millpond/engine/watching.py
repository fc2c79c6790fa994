"""Watching: a worker's look at its own session, and the sign of life that it gives to its heartbeat.

Run by `worker`, in one event loop. Invariants: a session that is gone is told of once it is seen; a lease for which no
attempt stands, at two looks in a row, is handed back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Set as AbstractSet

import orjson
import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine import heartbeat, remote, waits
from millpond.engine.attempt import Attempt
from millpond.engine.hints import Hints
from millpond.engine.leases import Lease
from millpond.engine.scope import Scope, announce
from millpond.engine.slots import Slots
from millpond.engine.step_executor import StepAttempt
from millpond.engine.upkeep import tell_readied
from millpond.errors import LeaseLost, MillpondError

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.worker")
_TICK_S = 0.05
_WATCH_S = 1.0


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
        launching: AbstractSet[Lease],
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

    async def run(self) -> None:
        """Notice a lost session, runs that shall stop, and leases that no attempt stands for."""
        suspects: set[Lease] = set()
        looked_at = 0.0
        while True:
            self._look.clear()
            try:
                await self._check_session()
                if time.monotonic() - looked_at >= _WATCH_S:
                    looked_at = time.monotonic()
                    suspects = await self.hand_back_unknown(suspects)
            except MillpondError as error:
                _log.warning("watch.failed", error=error.code)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), _WATCH_S)

    async def hand_back_unknown(self, suspects: set[Lease]) -> set[Lease]:
        """Release leases that stood without an attempt before and still do; returns the new ones.

        They come from claims and commits of unknown outcome. With no `suspects` all are new.
        """
        async with self._database.duty("reconcile") as con:
            rows = await con.fetch(_SQL["own_leases"], self._worker_id)
        known = {one.claimed.lease for one in self._attempts} | self._launching
        unknown = {Lease(*row) for row in rows} - known
        for lease in unknown & suspects:
            _log.warning("lease.handed_back", run_id=str(lease.run_id))
            with contextlib.suppress(LeaseLost):
                give_back = remote.release if lease.is_of_step else waits.release
                tell_readied(
                    self._hints, await give_back(self._database, lease, reason="no attempt")
                )
        return unknown - suspects

    async def _check_session(self) -> None:
        async with self._database.duty("watch") as con:
            if not await con.fetchval(_SQL["is_alive"], self._worker_id):
                self._lost.set()
                return
            rows = await con.fetch(_SQL["cancel_requested"], self._worker_id)
            told = (_json(self._slots.used()), _json(self._slots.told()))
            if told != self._noted:
                await con.execute(_SQL["note_use"], self._worker_id, *told)
                self._noted = told
        asked = {(row["org_id"], row["item_id"]) for row in rows}
        for attempt in list(self._attempts):
            if (attempt.claimed.lease.org_id, attempt.claimed.lease.item_id) in asked:
                attempt.unwind("cancelled")


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
