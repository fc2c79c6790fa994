"""The worker: opens sessions, executes in its slots what they claim, drains.

Composed and run by `cli`. Invariants: no claim lets more attempts execute code in a queue than it has slots; a
worker whose session is gone drops its attempts and opens a new session; after `stop` nothing more is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from millpond import veil
from millpond.db.pool import EngineDatabase
from millpond.engine import heartbeat, sessions, waking
from millpond.engine.attempt import Attempt
from millpond.engine.charging import settle_all
from millpond.engine.claim import Claimer
from millpond.engine.claiming import Claims, first
from millpond.engine.equipping import equipped
from millpond.engine.executor import execute
from millpond.engine.hints import CANCELLED, SUMMONED, WAKE, Hints
from millpond.engine.launching import Launcher
from millpond.engine.leasehold import Leasehold, cut_connections
from millpond.engine.leases import Lease
from millpond.engine.placing import Placing
from millpond.engine.quarantine import Quarantine, alone
from millpond.engine.registry import Flow, Step, meets
from millpond.engine.retention import Keep
from millpond.engine.riding import Riding
from millpond.engine.rights import Rights
from millpond.engine.scope import Scope
from millpond.engine.slots import Slots
from millpond.engine.spilling import Spill, served_slots
from millpond.engine.step_attempt import StepAttempt
from millpond.engine.step_executor import execute_step
from millpond.engine.throttling import Throttling
from millpond.engine.upkeep import Upkeep, tell_readied
from millpond.engine.urgency import LEAD_S
from millpond.engine.vault import Vault
from millpond.engine.watching import Watch, tick
from millpond.errors import MillpondError, Transient

_log = structlog.get_logger("millpond.worker")

_PAUSE_S = 0.2
_UNWIND_S = 10.0
_STOP_S = 35.0  # above the time limit of the engine's statements


class Worker:
    """One worker process: its slots per queue, the flows and steps that it has, the resources of its steps.

    Without `rights` it acts for nobody whose rights have to be asked about, without a `vault` it opens no secrets.
    It publishes all of its flows, and serves those flows and steps whose needs its `labels` meet.
    """

    def __init__(
        self,
        *,
        database: EngineDatabase,
        engine_url: str,
        listen_url: str,
        flows: Sequence[Flow],
        slots: Mapping[str, int],
        steps: Iterable[Step[Any, Any]] = (),
        labels: Mapping[str, str] | None = None,
        resources: Mapping[type, object] | None = None,
        lease_s: float = 6.0,
        silent_s: float = heartbeat.SILENT_S,
        drain_s: float = 20.0,
        gather_s: float = 0.001,
        alone: bool = False,
        alone_command: Sequence[str] = (),
        keep: Keep | None = None,
        rights: Rights | None = None,
        vault: Vault | None = None,
        spill: Spill | None = None,
        lead_s: float = LEAD_S,
    ) -> None:
        self._rights = rights
        self._vault = vault
        self._lead_s = lead_s
        self._database = database
        self._engine_url = engine_url
        self._listen_url = listen_url
        self._flows = {(flow.name, flow.version): flow for flow in flows}
        self._steps = {step.name: step for step in steps}
        self._labels = dict(labels or {})
        self._throttling = Throttling(database)
        # Who executes one work item alone takes it from any queue, as if that had a slot of its own.
        spill = spill or Spill()
        self._slots = (
            Slots(dict.fromkeys(served_slots(slots, spill), 1)) if alone else Slots(slots, spill)
        )
        self._placing = Placing(threads=sum(slots.values()))
        self._resources = dict(resources or {})
        self._lease_s = lease_s
        self._silent_s = silent_s
        self._drain_s = drain_s
        self._gather_s = gather_s
        self._is_alone = alone
        self._keep = keep
        self.has_worked = False
        self._attempts: set[Attempt | StepAttempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leasehold = Leasehold()
        self._lost = asyncio.Event()
        self._look = asyncio.Event()
        self._stopping = asyncio.Event()
        self.worker_id = uuid.uuid4()
        self._quarantine = Quarantine(
            alone_command,
            capabilities=self._able(),
            queues=list(self._slots.served),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then drain and return."""
        while not stop.is_set():
            self._lost.clear()
            self._stopping.clear()
            try:
                await sessions.publish(self._database, list(self._flows.values()))
                await self._session(stop)
            except Transient as error:
                _log.warning("worker.database_away", error=error.code)
                await asyncio.sleep(1.0)
            if self._is_alone:
                break
            if not stop.is_set():  # a session that a fault ended is not opened again in a hurry
                await asyncio.sleep(_PAUSE_S)
        await self._quarantine.close(self._drain_s)
        self._placing.close()

    def _able(self) -> list[str]:
        """Name what this worker can execute: flows, and steps of runs elsewhere."""
        known: list[Flow | Step[Any, Any]] = [*self._flows.values(), *self._steps.values()]
        return [one.capability for one in known if meets(self._labels, one.needs)]

    def _capabilities(self) -> list[str]:
        """Name what this worker claims: a worker for one work item alone, only such work."""
        return alone(self._able()) if self._is_alone else self._able()

    async def _session(self, stop: asyncio.Event) -> None:
        """Work under one worker id until told to stop or until its session is gone."""
        self.worker_id = uuid.uuid4()
        sent = time.monotonic()
        await sessions.register(
            self._database,
            worker_id=self.worker_id,
            served={} if self._is_alone else self._slots.served,
            capabilities=self._capabilities(),
            lease_s=self._lease_s,
            labels=self._labels,
            spill=None if self._is_alone else self._slots.spill,
        )
        pulse = heartbeat.Pulse.make()
        pulse.renew(sent + self._lease_s)
        self._leasehold = Leasehold(pulse)
        beat = await heartbeat.start(
            url=self._engine_url,
            worker_id=self.worker_id,
            lease_s=self._lease_s,
            pulse=pulse,
            silent_s=self._silent_s,
        )
        heard = {
            WAKE: self._hear_wake,
            CANCELLED: self._hear_cancel,
            SUMMONED: self._hear_summons,
        }
        try:
            async with equipped(
                self._database,
                engine_url=self._engine_url,
                listen_url=self._listen_url,
                worker_id=self.worker_id,
                slots=self._slots,
                placing=self._placing,
                throttling=self._throttling,
                resources=self._resources,
                labels=self._labels,
                rights=self._rights,
                vault=self._vault,
                leasehold=self._leasehold,
                expect=pulse.expect,
                gather_s=self._gather_s,
                heard=heard,
                on_cancel_requested=lambda lease: self._unwind(lease, "cancelled"),
            ) as scope:
                await self._serve(scope, beat, pulse, stop)
        finally:
            await sessions.close(self._database, self.worker_id, beat)
            pulse.close()

    async def _serve(
        self,
        scope: Scope,
        beat: asyncio.subprocess.Process,
        pulse: heartbeat.Pulse,
        stop: asyncio.Event,
    ) -> None:
        """Claim and execute in a session, until told to stop or until it is gone; then drain, or drop all."""
        _log.info("worker.started", worker_id=str(self.worker_id), slots=self._slots.served)
        launcher = Launcher(
            scope,
            self._slots,
            flows=self._flows,
            steps=self._steps,
            start=partial(self._start, scope, scope.hints),
        )
        watch = Watch(
            self._database,
            scope.hints,
            self._slots,
            worker_id=self.worker_id,
            attempts=self._attempts,
            launching=launcher.leases,
            look=self._look,
            lost=self._lost,
        )
        loops = [
            asyncio.create_task(self._claim(launcher, scope.riding, stop), name="claim"),
            asyncio.create_task(watch.run(), name="watch"),
            asyncio.create_task(tick(beat, pulse, scope, self._lost), name="tick"),
            asyncio.create_task(waking.wake_all(self._database, scope.mixed), name="wake"),
            asyncio.create_task(self._settle(), name="charge"),
        ]
        if not self._is_alone:
            loops += self._upkeep(scope.hints)
        try:
            await first(stop.wait(), self._lost.wait(), also=[*loops, *scope.committer.tasks])
            if stop.is_set():
                self._quarantine.drain()
            await self._stop_claiming(loops[0])
            if not stop.is_set() or self._lost.is_set():
                _log.warning("worker.session_lost", worker_id=str(self.worker_id))
                await self._unwind_all("lost")
            else:
                await self._drain(scope.riding, serves=loops[0].done())
                await self._leave_nothing(watch)
        finally:
            for loop in loops:
                loop.cancel()
            for ended in await asyncio.gather(*loops, return_exceptions=True):
                if isinstance(ended, Exception):
                    _log.error("worker.loop_died", exc_info=ended)

    async def _claim(self, launcher: Launcher, riding: Riding, stop: asyncio.Event) -> None:
        """Claim until nothing more is to be claimed; one work item that is executed alone ends the worker."""
        claimer = Claimer(
            self._database,
            worker_id=self.worker_id,
            capabilities=self._capabilities(),
            estimate_s=self._slots.estimate_s,
            try_s=self._slots.try_s,
            lead_s=LEAD_S if self._is_alone else self._lead_s,
        )
        claims = Claims(
            claimer,
            self._slots,
            launcher=launcher,
            riding=riding,
            throttling=self._throttling,
            stopping=self._stopping,
            lost=self._lost,
            attempts=self._attempts,
            tasks=self._tasks,
        )
        if not self._is_alone:
            await claims.all()
            return
        try:
            await claims.one()
        finally:
            self.has_worked = claims.has_worked
        stop.set()

    def _upkeep(self, hints: Hints) -> list[asyncio.Task[None]]:
        """Begin what is done for all, by whichever worker comes first."""
        upkeep = Upkeep(self._database, hints, self._quarantine, lease_s=self._lease_s)
        loops = {
            "look": upkeep.look(),
            "maintain": upkeep.maintain(),
            "free": upkeep.free(),
            "carry out": upkeep.carry_out(),
            "count": upkeep.count(),
            "sample": upkeep.sample(),
            "forget": upkeep.forget(),
        }
        if self._keep is not None:
            loops["prune"] = upkeep.prune(self._keep)
        return [asyncio.create_task(loop, name=name) for name, loop in loops.items()]

    async def _settle(self) -> None:
        """Charge orgs what their work uses beyond what its claims charged."""
        slots = sum(self._slots.total.values())
        await settle_all(self._slots.charges, self._database, slots=slots)

    async def _stop_claiming(self, claiming: asyncio.Task[None]) -> None:
        """Let the claim loop end after its turn, so that no lease is left without an attempt."""
        self._stopping.set()
        self._slots.wake()
        await asyncio.wait({claiming}, timeout=_STOP_S)

    async def _leave_nothing(self, watch: Watch) -> None:
        with contextlib.suppress(MillpondError):
            await watch.hand_back_unknown(await watch.hand_back_unknown(set()))

    # Executing

    def _start(self, scope: Scope, hints: Hints, attempt: Attempt | StepAttempt) -> None:
        self._attempts.add(attempt)
        # With a name, since one for each would be made else.
        task = scope.loop.create_task(self._execute(attempt, scope, hints), name="attempt")
        self._tasks.add(task)

    async def _execute(self, attempt: Attempt | StepAttempt, scope: Scope, hints: Hints) -> None:
        if attempt.slot is not None:
            attempt.slot.start(attempt.claimed.lease.org_id, attempt.capability)
        veil.begin()
        try:
            if isinstance(attempt, StepAttempt):
                tell_readied(hints, await execute_step(attempt, scope))
            else:
                tell_readied(hints, await execute(attempt, scope))
        finally:
            self._attempts.discard(attempt)
            self._tasks.discard(asyncio.current_task(scope.loop))
            scope.riding.tolls.over(attempt.claimed)
            if attempt.slot is not None:
                attempt.slot.give()

    # Hearing

    def go_on(self) -> None:
        """Hear, before anything else is executed, that this process goes on after it was stopped.

        Where its leases may be somebody else's by now, nothing leaves it until that is known, and nothing of them then.
        Called in a signal's handler, in the thread of the loop.
        """
        if self._leasehold.is_sure:
            return
        self._leasehold.hold(self._lease_s)
        if self._leasehold.is_gone:
            self._lost.set()
            for attempt in list(self._attempts):
                attempt.unwind("lost")
            cut_connections()

    def _hear_wake(self, payload: str) -> None:
        words = payload.split(",")
        if "*" in words or not self._slots.served.keys().isdisjoint(words):
            self._slots.wake()

    def _hear_summons(self, payload: str) -> None:
        if payload == "*" or str(self.worker_id) in payload:
            self._slots.wake()

    def _hear_cancel(self, _payload: str) -> None:
        """Look sooner: the live row says which runs shall stop, the hint does not."""
        self._look.set()

    def _unwind(self, lease: Lease, reason: str) -> None:
        for attempt in list(self._attempts):
            if attempt.claimed.lease == lease:
                attempt.unwind(reason)

    # Ending

    async def _drain(self, riding: Riding, *, serves: bool) -> None:
        """Let runs finish for a while, then hand the rest back; heartbeats go on meanwhile.

        Room for steps, too, where it `serves`: a claim that hangs may come to its end yet.
        """
        _log.info("worker.draining", runs=len(self._attempts))
        await sessions.tell_drain(self._database, self.worker_id)
        if self._tasks:
            serving = asyncio.create_task(riding.serve(), name="ride") if serves else None
            await asyncio.wait(self._tasks, timeout=self._drain_s)
            if serving is not None:
                serving.cancel()
                await asyncio.wait({serving})
        await self._unwind_all("drained")

    async def _unwind_all(self, reason: str) -> None:
        """End all attempts. One whose thread goes on keeps its lease until that returns.

        A lease that is lost need not be kept: then only its slot waits for the thread.
        """
        for attempt in list(self._attempts):
            attempt.unwind(reason)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_UNWIND_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_UNWIND_S if reason == "lost" else None)
