"""Launching: claimed work becomes attempts in slots of its worker, beside the next claim.

Called by `worker`. Invariants: slots are taken at once, before there can be another claim, and each goes to an
attempt or is given back; work is started in the order of its claims; what cannot be started is left to the watch,
which hands it back, and its slots stay taken meanwhile, so that claims do not go on at full speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog

from millpond.engine import history, inputs, remote, waits
from millpond.engine.attempt import Attempt
from millpond.engine.executor import prepare
from millpond.engine.leases import Claimed, Lease
from millpond.engine.registry import Flow, Step
from millpond.engine.scope import Scope
from millpond.engine.slots import Slot, Slots
from millpond.engine.step_attempt import StepAttempt
from millpond.errors import LeaseLost, MillpondError

_log = structlog.get_logger("millpond.worker")
# Of what a claim brought so many are started at a time: the first ones' writes go off meanwhile.
_CHUNK = 32
# How long slots of what could not be started stay taken: the watch hands leases back at its second look.
_PAUSE_S = 2.0


class Launcher:
    """Starts what one session of a worker claims; `start` executes an attempt in its slot."""

    def __init__(
        self,
        scope: Scope,
        slots: Slots,
        *,
        flows: Mapping[tuple[str, int], Flow],
        steps: Mapping[str, Step[Any, Any]],
        start: Callable[[Attempt | StepAttempt], None],
    ) -> None:
        self._scope = scope
        self._slots = slots
        self._flows = flows
        self._steps = steps
        self._start = start
        self._last: asyncio.Task[int] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._launching: list[Sequence[Claimed]] = []

    def launch(
        self, claimed: Sequence[Claimed], expected: Mapping[str, float] | None = None
    ) -> asyncio.Task[int]:
        """Take slots for claimed work and begin to start it, after what was launched before.

        `expected` is what its claim charged for it, by capability.
        The task ends when all of it is started and tells how much that was; it raises what is no MillpondError.
        """
        slots = [
            self._slots.take(one.queue, one.helper, one.crossings, expected=expected)
            for one in reversed(claimed)
        ]
        self._launching.append(claimed)
        self._last = asyncio.create_task(self._launch(claimed, slots, self._last), name="launch")
        # Also where the task is ended before its first step, of which it knows nothing itself.
        self._last.add_done_callback(lambda _: self._end(claimed, slots))
        return self._last

    def leases(self) -> set[Lease]:
        """Return those of work that may not be started yet: of all that a launch has, until it is over."""
        return {one.lease for claimed in self._launching for one in claimed}

    def _forget(self, claimed: Sequence[Claimed]) -> None:
        self._launching = [one for one in self._launching if one is not claimed]

    def check(self) -> None:
        """Raise what ended a start that was no refusal."""
        if self._last is not None and self._last.done():
            self._last.result()

    async def close(self, *, at_once: bool) -> None:
        """Wait until all that was launched is started, or give it up."""
        if self._last is not None:
            if at_once:
                self._last.cancel()
            await self._last
        if self._returning:
            await asyncio.wait(self._returning)

    async def _launch(
        self, claimed: Sequence[Claimed], slots: list[Slot], before: asyncio.Task[int] | None
    ) -> int:
        started = 0
        late: list[tuple[Attempt | StepAttempt, Slot]] = []
        try:
            if before is not None:
                await before
            for nth, attempt in enumerate(await self._attempts(claimed), 1):
                begin_by = attempt.claimed.begin_by
                if begin_by is not None and time.monotonic() > begin_by:
                    late.append((attempt, slots.pop()))
                else:
                    attempt.slot = slots.pop()
                    self._start(attempt)
                    started += 1
                if nth % _CHUNK == 0:
                    await asyncio.sleep(0)
        except MillpondError as error:
            _log.warning("start.failed", error=error.code)
            self._forget(claimed)
            await asyncio.sleep(_PAUSE_S)
        finally:
            # Beside the next launch, which would come too late itself if it waited for this one's writes.
            for one in late:
                returning = asyncio.create_task(self._hand_back(*one), name="late")
                self._returning.add(returning)
                returning.add_done_callback(self._returning.discard)
        return started

    async def _hand_back(self, attempt: Attempt | StepAttempt, slot: Slot) -> None:
        """Queue again what was not begun in time for the rate that let it go: it is admitted anew."""
        lease = attempt.claimed.lease
        self._scope.riding.tolls.over(attempt.claimed)
        give_back = remote.release if lease.is_of_step else waits.release
        try:
            with contextlib.suppress(LeaseLost):
                readied = await give_back(self._scope.database, lease, reason="late")
                self._scope.hints.wake({one.queue for one in readied})
        except MillpondError as error:  # the watch hands it back
            _log.warning("late.release_failed", error=error.code)
        finally:
            slot.give_unused(lease.org_id, attempt.capability)

    def _end(self, claimed: Sequence[Claimed], slots: list[Slot]) -> None:
        """Let the rest of a launch go: leave its leases to the watch, and give back the slots that no attempt has."""
        self._forget(claimed)
        for one in claimed[len(claimed) - len(slots) :]:
            flow = self._flows.get((one.flow, one.version)) if one.kind == "run" else None
            if one.seats:
                self._scope.riding.tolls.over(one)
            slots.pop().give_unused(one.lease.org_id, flow.capability if flow else "")

    async def _attempts(self, claimed: Sequence[Claimed]) -> Iterator[Attempt | StepAttempt]:
        """Make work ready, one after the other, with what it needs beyond its lease: inputs, arguments, recorded steps.

        Nothing of it is kept here: a run that waits is not to be held in memory.
        """
        database = self._scope.database
        claimed = await inputs.complete(database, claimed)
        steps = [one.lease for one in claimed if one.kind == "step"]
        again = [
            one.lease
            for one in claimed
            if (one.lease.attempt > 1 or one.is_rerun) and one.kind == "run"
        ]
        orders = await remote.orders(database, steps)
        histories = await history.load(database, again)

        def made(one: Claimed) -> Attempt | StepAttempt:
            if one.kind == "step":
                return StepAttempt(one, self._steps, orders.get(one.lease))
            recorded = histories.get(one.lease, {}) if histories else {}
            return prepare(one, self._flows, recorded, self._scope)

        return map(made, claimed)
