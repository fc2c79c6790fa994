"""Launching: claimed work becomes attempts in slots of its worker, beside the next claim.

Called by `worker`. Invariant: slots are taken at once, before there can be another claim, and each goes to an
attempt or is given back; what cannot be started is left to the watch, which hands it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from millpond.engine import history, inputs, remote
from millpond.engine.attempt import Attempt
from millpond.engine.claim import Claimed
from millpond.engine.executor import prepare
from millpond.engine.registry import Flow, Step
from millpond.engine.scope import Scope
from millpond.engine.slots import Slot, Slots
from millpond.engine.step_executor import StepAttempt
from millpond.errors import MillpondError

_log = structlog.get_logger("millpond.worker")
# Of what a claim brought so many are started at a time: the first ones' writes go off meanwhile.
_CHUNK = 32


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

    def launch(self, claimed: Sequence[Claimed]) -> asyncio.Task[None]:
        """Take slots for claimed work and begin to start it; the task ends when all of it is started."""
        slots = [self._slots.take(one.queue) for one in claimed]
        return asyncio.create_task(self._launch(claimed, slots), name="launch")

    async def _launch(self, claimed: Sequence[Claimed], slots: list[Slot]) -> None:
        """Start work with what it needs beyond its lease: big inputs, arguments, recorded steps.

        Nothing of it is kept here: a run that waits is not to be held in memory.
        """
        slots.reverse()
        database = self._scope.database
        try:
            claimed = await inputs.complete(database, claimed)
            steps = [one.lease for one in claimed if one.kind == "step"]
            again = [
                one.lease
                for one in claimed
                if (one.lease.attempt > 1 or one.is_rerun) and one.kind == "run"
            ]
            orders = await remote.orders(database, steps)
            histories = await history.load(database, again)
            for nth, one in enumerate(claimed, 1):
                attempt: Attempt | StepAttempt
                if one.kind == "step":
                    attempt = StepAttempt(one, self._steps, orders.get(one.lease))
                else:
                    recorded = histories.get(one.lease, {})
                    attempt = prepare(one, self._flows, recorded, self._scope)
                attempt.slot = slots.pop()
                self._start(attempt)
                if nth % _CHUNK == 0:
                    await asyncio.sleep(0)
        except MillpondError as error:
            _log.warning("start.failed", error=error.code)
        finally:
            for slot in slots:
                slot.give_unused()
