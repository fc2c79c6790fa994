"""The worker: claims work for its slots, executes it, keeps its session alive, drains.

Composed and run by `cli`. Invariants: never more attempts in a queue than it has slots; a worker whose
session is gone drops its attempts and opens a new session; after `stop` nothing more is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Mapping, Sequence

import orjson
import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine import heartbeat, history, waits
from millpond.engine.claim import Claimed, Claimer, Lease
from millpond.engine.commit import Committer
from millpond.engine.context import Scope
from millpond.engine.executor import Attempt, execute, prepare
from millpond.engine.hints import CANCELLED, WAKE, Hints, Listener
from millpond.engine.maintenance import Maintenance
from millpond.engine.registry import Flow
from millpond.engine.slots import Slots
from millpond.engine.waits import Readied
from millpond.errors import LeaseLost, MillpondError, Transient

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.worker")

_BUSY_POLL_S = 0.1
_IDLE_POLL_S = 1.0
_TICK_S = 0.25
_CHORE_S = 0.25
_UNWIND_S = 10.0


class Worker:
    """One worker process: its slots per queue, the flows that it has, the resources of its steps."""

    def __init__(
        self,
        *,
        database: EngineDatabase,
        engine_url: str,
        listen_url: str,
        flows: Sequence[Flow],
        slots: Mapping[str, int],
        resources: Mapping[type, object] | None = None,
        lease_s: float = 6.0,
        drain_s: float = 20.0,
        gather_s: float = 0.002,
    ) -> None:
        self._database = database
        self._engine_url = engine_url
        self._listen_url = listen_url
        self._flows = {(flow.name, flow.version): flow for flow in flows}
        self._slots = Slots(slots)
        self._resources = dict(resources or {})
        self._lease_s = lease_s
        self._drain_s = drain_s
        self._gather_s = gather_s
        self._attempts: set[Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost = asyncio.Event()
        self._look_for_cancels = asyncio.Event()
        self._is_draining = False
        self.worker_id = uuid.uuid4()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then drain and return."""
        while not stop.is_set():
            self._lost.clear()
            try:
                await self._publish()
                await self._session(stop)
            except Transient as error:
                _log.warning("worker.database_away", error=error.code)
                await asyncio.sleep(1.0)

    async def _publish(self) -> None:
        """Tell the API which flows can be run."""
        async with self._database.duty("publish") as con:
            for flow in self._flows.values():
                await con.execute(
                    _SQL["publish_flow"],
                    flow.name,
                    flow.version,
                    flow.queue,
                    flow.permission,
                    flow.description,
                    orjson.dumps(flow.input.json_schema()).decode(),
                    orjson.dumps(flow.output.json_schema(mode="serialization")).decode(),
                    flow.timeout_s,
                )

    async def _session(self, stop: asyncio.Event) -> None:
        """Work under one worker id until told to stop or until its session is gone."""
        self.worker_id = uuid.uuid4()
        async with self._database.duty("register") as con:
            await con.execute(
                _SQL["register_worker"],
                self.worker_id,
                socket.gethostname(),
                os.getpid(),
                orjson.dumps(self._slots.total).decode(),
                [flow.capability for flow in self._flows.values()],
                self._lease_s,
            )
        pulse = heartbeat.Pulse.make()
        beat = await heartbeat.start(
            url=self._engine_url, worker_id=self.worker_id, lease_s=self._lease_s, pulse=pulse
        )
        hints = await Hints.connect(self._engine_url)
        committer = Committer(
            self._database,
            hints,
            on_cancel_requested=lambda lease: self._unwind(lease, "cancelled"),
            gather_s=self._gather_s,
        )
        committer.start()
        listener = Listener(self._listen_url, {WAKE: self._hear_wake, CANCELLED: self._hear_cancel})
        await listener.start()
        scope = Scope(database=self._database, committer=committer, resources=self._resources)
        _log.info("worker.started", worker_id=str(self.worker_id), slots=self._slots.total)
        loops = [
            asyncio.create_task(self._claim_all(scope, hints), name="claim"),
            asyncio.create_task(self._chores(hints), name="chores"),
            asyncio.create_task(self._watch(beat, pulse), name="watch"),
        ]
        try:
            await _first(stop.wait(), self._lost.wait())
            loops[0].cancel()
            if self._lost.is_set():
                _log.warning("worker.session_lost", worker_id=str(self.worker_id))
                await self._unwind_all("lost")
            else:
                await self._drain()
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await listener.close()
            await committer.close()
            await hints.close()
            await self._close_session(beat)
            pulse.close()

    async def _close_session(self, beat: asyncio.subprocess.Process) -> None:
        if beat.stdin is not None:
            beat.stdin.close()
        with contextlib.suppress(MillpondError):
            async with self._database.duty("unregister") as con:
                await con.execute(_SQL["remove_worker"], self.worker_id)
        try:
            await asyncio.wait_for(beat.wait(), 5)
        except TimeoutError:
            beat.kill()
            await beat.wait()
        _log.info("worker.stopped", worker_id=str(self.worker_id))

    # Claiming

    async def _claim_all(self, scope: Scope, hints: Hints) -> None:
        """Claim whenever there is room and reason; polls as a net below the hints."""
        averages = self._slots.estimate_s
        claimer = Claimer(
            self._database,
            worker_id=self.worker_id,
            capabilities=[flow.capability for flow in self._flows.values()],
            estimate_s=averages,
        )
        while True:
            free = self._slots.free()
            if not free:
                await self._slots.wait(_IDLE_POLL_S)
                continue
            self._slots.expect()
            try:
                claimed, has_more = await claimer.claim(free)
                histories = await history.load(
                    self._database, [one.lease for one in claimed if one.lease.attempt > 1]
                )
            except MillpondError as error:
                _log.warning("claim.failed", error=error.code)
                await self._hand_back_unknown(hints)
                continue
            for one in claimed:
                self._start(one, histories.get(one.lease.run_id, {}), scope, hints)
            self._slots.note_claim(free, claimed)
            if not has_more:
                await self._slots.wait(_BUSY_POLL_S if self._attempts else _IDLE_POLL_S)

    async def _hand_back_unknown(self, hints: Hints) -> None:
        """Release leases that a claim of unknown outcome may have left without an attempt."""
        while True:
            await asyncio.sleep(0.5)
            try:
                async with self._database.duty("reconcile") as con:
                    rows = await con.fetch(_SQL["own_leases"], self.worker_id)
                known = {attempt.claimed.lease for attempt in self._attempts}
                for lease in (Lease(*row) for row in rows):
                    if lease not in known:
                        self._hint(
                            hints, [await waits.release(self._database, lease, reason="lost claim")]
                        )
            except LeaseLost:
                continue
            except MillpondError as error:
                _log.warning("reconcile.failed", error=error.code)
                continue
            return

    def _start(
        self, claimed: Claimed, recorded: history.History, scope: Scope, hints: Hints
    ) -> None:
        attempt = prepare(claimed, self._flows, recorded, scope)
        self._attempts.add(attempt)
        self._slots.take(claimed.queue)
        task = asyncio.create_task(self._execute(attempt, scope, hints))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _execute(self, attempt: Attempt, scope: Scope, hints: Hints) -> None:
        began = time.monotonic()
        claimed = attempt.claimed
        try:
            self._hint(hints, await execute(attempt, scope))
        finally:
            self._attempts.discard(attempt)
            self._slots.give(claimed.queue, attempt.flow.capability, time.monotonic() - began)

    def _hint(self, hints: Hints, readied: Sequence[Readied]) -> None:
        if readied:
            hints.wake({one.queue for one in readied})
            hints.changed(one.run_id for one in readied)

    # Hearing

    def _hear_wake(self, payload: str) -> None:
        if payload == "*" or not self._slots.total.keys().isdisjoint(payload.split(",")):
            self._slots.wake()

    def _hear_cancel(self, payload: str) -> None:
        if payload == "*":
            self._look_for_cancels.set()
            return
        asked = set(payload.split(","))
        for attempt in list(self._attempts):
            if str(attempt.claimed.lease.run_id) in asked:
                attempt.context.unwind("cancelled")

    def _unwind(self, lease: Lease, reason: str) -> None:
        for attempt in list(self._attempts):
            if attempt.claimed.lease == lease:
                attempt.context.unwind(reason)

    # Chores

    async def _chores(self, hints: Hints) -> None:
        """Rescue, fire timers; sleeps until the next timer, at most a moment."""
        maintenance = Maintenance(self._database, lease_s=self._lease_s)
        while True:
            pause_s = _CHORE_S
            try:
                self._hint(hints, await maintenance.rescue())
                self._hint(hints, await maintenance.fire())
                due_s = await maintenance.next_due_s()
                if due_s is not None:
                    pause_s = max(0.005, min(pause_s, due_s))
            except MillpondError as error:
                _log.warning("maintenance.failed", error=error.code)
            await asyncio.sleep(pause_s)

    async def _watch(self, beat: asyncio.subprocess.Process, pulse: heartbeat.Pulse) -> None:
        """Tick for the heartbeat; notice a lost session and runs that shall stop."""
        checked = 0.0
        while True:
            deadlines = [attempt.context.deadline for attempt in self._attempts]
            first = min((one for one in deadlines if one is not None), default=None)
            pulse.write(time.monotonic(), first)
            if beat.returncode is not None:
                self._lost.set()
                return
            if time.monotonic() - checked > 1.0 or self._look_for_cancels.is_set():
                checked = time.monotonic()
                self._look_for_cancels.clear()
                with contextlib.suppress(MillpondError):
                    await self._check_session()
            await asyncio.sleep(_TICK_S)

    async def _check_session(self) -> None:
        async with self._database.duty("watch") as con:
            if not await con.fetchval(_SQL["is_alive"], self.worker_id):
                self._lost.set()
                return
            rows = await con.fetch(_SQL["cancel_requested"], self.worker_id)
        asked = {(row["org_id"], row["run_id"]) for row in rows}
        for attempt in list(self._attempts):
            if (attempt.claimed.lease.org_id, attempt.claimed.lease.run_id) in asked:
                attempt.context.unwind("cancelled")

    # Ending

    async def _drain(self) -> None:
        """Let runs finish for a while, then hand the rest back; heartbeats go on meanwhile."""
        _log.info("worker.draining", runs=len(self._attempts))
        with contextlib.suppress(MillpondError):
            async with self._database.duty("drain") as con:
                await con.execute(_SQL["drain_worker"], self.worker_id)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._drain_s)
        await self._unwind_all("drained")

    async def _unwind_all(self, reason: str) -> None:
        for attempt in list(self._attempts):
            attempt.context.unwind(reason)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_UNWIND_S)
        for task in self._tasks:
            task.cancel()


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(one) for one in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
