"""The worker: claims work for its slots, executes it, keeps its session alive, drains.

Composed and run by `cli`. Invariants: no claim lets more attempts execute code in a queue than it has slots; a
worker whose session is gone drops its attempts and opens a new session; after `stop` nothing more is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import orjson
import structlog

from millpond import veil
from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine import heartbeat, waking
from millpond.engine.attempt import Attempt
from millpond.engine.charging import settle_all
from millpond.engine.claim import Claimer
from millpond.engine.commit import Committer
from millpond.engine.deltas import Deltas
from millpond.engine.executor import execute
from millpond.engine.family import Family
from millpond.engine.hints import CANCELLED, SUMMONED, WAKE, Hints, Listener
from millpond.engine.launching import Launcher
from millpond.engine.leasehold import Leasehold, cut_connections
from millpond.engine.leases import Lease
from millpond.engine.placing import Placing
from millpond.engine.quarantine import Quarantine, alone
from millpond.engine.registry import Flow, Step, meets
from millpond.engine.resting import Resting
from millpond.engine.retention import Keep
from millpond.engine.riding import Riding
from millpond.engine.rights import Asking, Rights
from millpond.engine.scope import Deadlines, Scope
from millpond.engine.settling import Settler
from millpond.engine.slots import Slots
from millpond.engine.spilling import Spill, served_slots
from millpond.engine.step_executor import StepAttempt, execute_step
from millpond.engine.throttling import Throttling
from millpond.engine.tolls import Tolls
from millpond.engine.upkeep import Upkeep, tell_readied
from millpond.engine.urgency import LEAD_S
from millpond.engine.vault import Vault
from millpond.engine.watching import Watch, tick
from millpond.errors import LeaseLost, MillpondError, Transient

_SQL = queries("maintenance")
_log = structlog.get_logger("millpond.worker")

_BUSY_POLL_S = 0.1
_IDLE_POLL_S = 1.0
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
                await self._publish()
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
                    flow.deadline_s,
                    orjson.dumps(dict(flow.needs)).decode(),
                    list(flow.keys),
                    flow.urgency,
                )

    def _capabilities(self) -> list[str]:
        """Name what this worker claims: a worker for one work item alone, only such work."""
        return alone(self._able()) if self._is_alone else self._able()

    async def _session(self, stop: asyncio.Event) -> None:
        """Work under one worker id until told to stop or until its session is gone."""
        self.worker_id = uuid.uuid4()
        sent = time.monotonic()
        async with self._database.duty("register") as con:
            await con.execute(
                _SQL["register_worker"],
                self.worker_id,
                socket.gethostname(),
                os.getpid(),
                orjson.dumps({} if self._is_alone else self._slots.served).decode(),
                self._capabilities(),
                self._lease_s,
                version("millpond"),
                orjson.dumps(self._labels).decode(),
            )
            if self._slots.spill and not self._is_alone:
                spill = orjson.dumps(self._slots.spill).decode()
                await con.execute(_SQL["tell_spill"], self.worker_id, spill)
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
        hints = await Hints.connect(self._engine_url)
        committer = Committer(
            self._database,
            hints,
            on_cancel_requested=lambda lease: self._unwind(lease, "cancelled"),
            gather_s=self._gather_s,
        )
        committer.start()
        heard = {
            WAKE: self._hear_wake,
            CANCELLED: self._hear_cancel,
            SUMMONED: self._hear_summons,
        }
        listener = Listener(self._listen_url, heard)
        await listener.start()
        settler = Settler(self._database, hints)
        deltas = Deltas(self._database, hints)
        family = Family(self._database)
        resting = Resting(self._database)
        riding = Riding(
            self._database,
            wake=self._slots.wake,
            on_freed=self._slots.free_room,
            summon=hints.summon,
            tolls=Tolls(self._slots.charges, self._slots.learn_try),
        )
        scope = Scope(
            database=self._database,
            committer=committer,
            hints=hints,
            settler=settler,
            deltas=deltas,
            family=family,
            resting=resting,
            placing=self._placing,
            throttling=self._throttling,
            riding=riding,
            worker_id=self.worker_id,
            resources=self._resources,
            labels=self._labels,
            asking=Asking(self._rights),
            vault=self._vault,
            timed=Deadlines(pulse.expect),
            leasehold=self._leasehold,
        )
        _log.info("worker.started", worker_id=str(self.worker_id), slots=self._slots.served)
        launcher = Launcher(
            scope,
            self._slots,
            flows=self._flows,
            steps=self._steps,
            start=partial(self._start, scope, hints),
        )
        watch = Watch(
            self._database,
            hints,
            self._slots,
            worker_id=self.worker_id,
            attempts=self._attempts,
            launching=launcher.leases,
            look=self._look,
            lost=self._lost,
        )
        claims = self._claim_one if self._is_alone else self._claim_all
        claiming = claims(launcher, riding, stop)
        loops = [
            asyncio.create_task(claiming, name="claim"),
            asyncio.create_task(watch.run(), name="watch"),
            asyncio.create_task(tick(beat, pulse, scope, self._lost), name="tick"),
            asyncio.create_task(waking.wake_all(self._database, scope.mixed), name="wake"),
            asyncio.create_task(self._settle(), name="charge"),
        ]
        if not self._is_alone:
            upkeep = Upkeep(self._database, hints, self._quarantine, lease_s=self._lease_s)
            loops.append(asyncio.create_task(upkeep.look(), name="look"))
            loops.append(asyncio.create_task(upkeep.maintain(), name="maintain"))
            loops.append(asyncio.create_task(upkeep.free(), name="free"))
            loops.append(asyncio.create_task(upkeep.carry_out(), name="carry out"))
            loops.append(asyncio.create_task(upkeep.count(), name="count"))
            loops.append(asyncio.create_task(upkeep.sample(), name="sample"))
            loops.append(asyncio.create_task(upkeep.forget(), name="forget"))
            if self._keep is not None:
                loops.append(asyncio.create_task(upkeep.prune(self._keep), name="prune"))
        try:
            await _first(stop.wait(), self._lost.wait(), also=[*loops, *committer.tasks])
            if stop.is_set():
                self._quarantine.drain()
            await self._stop_claiming(loops[0])
            if not stop.is_set() or self._lost.is_set():
                _log.warning("worker.session_lost", worker_id=str(self.worker_id))
                await self._unwind_all("lost")
            else:
                await self._drain(riding)
                await self._leave_nothing(watch)
        finally:
            for loop in loops:
                loop.cancel()
            for ended in await asyncio.gather(*loops, return_exceptions=True):
                if isinstance(ended, Exception):
                    _log.error("worker.loop_died", exc_info=ended)
            await listener.close()
            await scope.asking.close()
            await riding.close()
            await deltas.close()
            await family.close()
            await resting.close()
            await settler.close()
            await committer.close()
            await hints.close()
            await self._close_session(beat)
            pulse.close()

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

    async def _claim_all(self, launcher: Launcher, riding: Riding, _: asyncio.Event) -> None:
        """Claim whenever there is room and reason; polls as a net below the hints.

        What a claim brought is started beside the next claim, so that worker and database both have work.
        """
        claimer = Claimer(
            self._database,
            worker_id=self.worker_id,
            capabilities=self._capabilities(),
            estimate_s=self._slots.estimate_s,
            try_s=self._slots.try_s,
            lead_s=self._lead_s,
        )
        riding.attach(claimer)
        stopping = asyncio.create_task(self._stopping.wait())
        at_once = False
        try:
            while not self._stopping.is_set():
                launcher.check()
                wanted = self._slots.wanted()
                if not wanted and not riding.asks():
                    await _first(self._slots.room(), riding.some(), also=[stopping])
                    continue
                terms = self._slots.terms(wanted)
                self._slots.expect()
                asks = riding.asks()
                try:
                    claimed, has_more = await claimer.claim(wanted, terms, asks)
                except LeaseLost:
                    self._lost.set()
                    return
                except MillpondError as error:
                    # What it may have leased is found by the watch and handed back.
                    _log.warning("claim.failed", error=error.code)
                    await asyncio.sleep(0.5)
                    continue
                if claimed:
                    launcher.launch(claimed, claimer.expected)
                riding.tell(claimer)
                self._slots.note_claim(wanted, claimed, terms)
                self._slots.note_awaited(claimer.limits.awaited)
                self._throttling.watch(claimer.limits.opened)
                if not has_more:
                    is_busy = bool(claimed or self._attempts)
                    poll_s = _BUSY_POLL_S if is_busy else _IDLE_POLL_S
                    await self._slots.wait(claimer.limits.poll_s(poll_s, _BUSY_POLL_S))
        except asyncio.CancelledError:
            at_once = True
            raise
        finally:
            stopping.cancel()
            await launcher.close(at_once=at_once)

    async def _claim_one(self, launcher: Launcher, riding: Riding, stop: asyncio.Event) -> None:
        """Claim one work item that is executed alone, and stop when its attempt is over."""
        claimer = Claimer(
            self._database,
            worker_id=self.worker_id,
            capabilities=self._capabilities(),
            estimate_s=self._slots.estimate_s,
            try_s=self._slots.try_s,
        )
        riding.attach(claimer)
        try:
            for queue in self._slots.total:
                claimed, _ = await claimer.claim({queue: 1})
                if claimed:
                    self.has_worked = await launcher.launch(claimed) > 0
                    break
        except MillpondError as error:
            # What it may have leased is handed back as the session ends.
            _log.warning("claim.failed", error=error.code)
        if self._tasks:
            await _first(self._stopping.wait(), riding.serve(), also=list(self._tasks))
        stop.set()

    def _start(self, scope: Scope, hints: Hints, attempt: Attempt | StepAttempt) -> None:
        self._attempts.add(attempt)
        task = scope.loop.create_task(self._execute(attempt, scope, hints))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
        if payload == "*" or not self._slots.served.keys().isdisjoint(payload.split(",")):
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

    async def _drain(self, riding: Riding) -> None:
        """Let runs finish for a while, then hand the rest back; heartbeats and room for steps go on meanwhile."""
        _log.info("worker.draining", runs=len(self._attempts))
        with contextlib.suppress(MillpondError):
            async with self._database.duty("drain") as con:
                await con.execute(_SQL["drain_worker"], self.worker_id)
        if self._tasks:
            serving = asyncio.create_task(riding.serve(), name="ride")
            await asyncio.wait(self._tasks, timeout=self._drain_s)
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


async def _first(*starts: Awaitable[object], also: Sequence[asyncio.Task[Any]] = ()) -> None:
    """Wait until one of these ends; those begun here are ended."""
    tasks = [asyncio.ensure_future(one) for one in starts]
    try:
        await asyncio.wait([*tasks, *also], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
