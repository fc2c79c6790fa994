"""A step attempt: a claimed step of a run elsewhere, and how it is ended from outside.

Made by `launching`, executed by `step_executor`. Invariant: what was ended from outside once is ended for that reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from millpond.engine.branches import Unwind
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.registry import Step
from millpond.engine.remote import Order
from millpond.engine.slots import Slot


class StepAttempt:
    """A claimed step of a run elsewhere, with its code and what it shall do.

    `tries` is the number of its last try, `spent` what its tries used on models and no record told of yet.
    """

    def __init__(
        self, claimed: Claimed, steps: Mapping[str, Step[Any, Any]], order: Order | None
    ) -> None:
        self.claimed = claimed
        self.order = order
        self.step = steps.get(order.name) if order else None
        self.closed: str | None = None
        self.slot: Slot | None = None
        self.tries = claimed.tries + 1
        self.spent: list[Spent] = []
        self._task: asyncio.Task[Any] | None = None

    @property
    def capability(self) -> str:
        """What its worker must have for it."""
        return self.step.capability if self.step else ""

    def begin(self) -> None:
        """Make the current task the one that is ended from outside."""
        self._task = asyncio.current_task()

    def end(self) -> None:
        """Forget that task was cancelled; nothing cancels it any more."""
        task, self._task = self._task, None
        while task is not None and task.cancelling():
            task.uncancel()

    def unwind(self, reason: str) -> None:
        """End the step's function from outside."""
        if self.closed is None:
            self.closed = reason
            if self._task is not None:
                self._task.cancel()

    def check(self) -> None:
        """Raise Unwind when this attempt was ended from outside."""
        if self.closed is not None:
            raise Unwind(self.closed)
