"""Seating: a step with keys begins a try once it has room on them, else its branch parks.

Called by `performing`, one Seating per attempt. Invariants: no try of a step begins without room where a limit holds
for its keys; what waits in line executes nothing, and what a rate let go begins in time or asks anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from millpond.engine.branches import Branch, Branches
from millpond.engine.leases import Lease
from millpond.engine.needs import Answer, Ask
from millpond.engine.plans import Plan
from millpond.engine.riding import Riding

Own = Callable[[Awaitable[Any]], Awaitable[Any]]


class Seating:
    """The room of one attempt's steps; `seats` are those for whose sake the run was claimed, with their places."""

    def __init__(
        self,
        lease: Lease,
        riding: Riding,
        branches: Branches,
        *,
        seats: Iterable[tuple[str, int]] = (),
        begin_by: float | None = None,
    ) -> None:
        self._lease = lease
        self._riding = riding
        self._branches = branches
        self._seats = dict(seats)
        self._begin_by = begin_by

    async def take(self, branch: Branch, plan: Plan, own: Own) -> float:
        """Have room for one try; returns for how many seconds that was waited for here.

        Raises InvalidInput where there never is any.
        """
        since_us = self._seats.pop(plan.key, None)
        if since_us is not None:
            plan.is_seated = True
            if not _is_late(self._begin_by):
                return 0.0
        elif not self._riding.concerns(self._lease.org_id, plan.keys):
            return 0.0
        began = time.monotonic()
        ask = self._ask(plan, since_us, is_beside=self._branches.goes_beside(branch))
        while True:
            if plan.is_seated:  # it came too late for the rate that let it go
                plan.is_seated = False
                await own(asyncio.shield(self._riding.leave(ask)))
            answer = await self._wait(branch, plan, ask, own)
            plan.is_seated = answer.has_row
            if not _is_late(answer.begin_by):
                return time.monotonic() - began

    async def _wait(self, branch: Branch, plan: Plan, ask: Ask, own: Own) -> Answer:
        """Ride until the try may begin; the branch parks after the first answer that it may not."""
        rider = self._riding.ask(ask, self._branches)
        try:
            answer: Answer = await own(rider.told)
            if answer.refusal is not None:
                raise answer.refusal
            while not answer.is_seated:
                if rider.answer is not None and rider.answer.is_seated:
                    return rider.answer
                await self._branches.park(branch, plan.key, is_human=False, ask=ask)
                assert rider.answer is not None
                answer = rider.answer
            return answer
        finally:
            self._riding.forget(rider)
            last = rider.answer
            is_over = last is None or last.is_seated or last.refusal is not None
            if not is_over and self._branches.closed is None:
                self._riding.leave(ask)  # it may stand in line
            elif is_over and rider.answer is not None and rider.answer.has_row:
                plan.is_seated = self._branches.closed is None

    def leave(self, plan: Plan) -> None:
        """Give back the room of a try of which nothing was recorded; the end of a lease does so by itself."""
        if plan.is_seated:
            plan.is_seated = False
            if self._branches.closed is None:
                self._riding.leave(self._ask(plan), is_told=not plan.spent)

    def recorded(self, plan: Plan) -> None:
        """Note that a record has given back the room of its try."""
        if plan.is_seated:
            plan.is_seated = False
            self._riding.freed()

    def _ask(self, plan: Plan, since_us: int | None = None, *, is_beside: bool = False) -> Ask:
        return Ask(
            org_id=self._lease.org_id,
            item_id=self._lease.item_id,
            token=self._lease.token,
            step_key=plan.key,
            keys=plan.keys,
            since_us=since_us,
            is_beside=is_beside,
        )


def _is_late(begin_by: float | None) -> bool:
    return begin_by is not None and time.monotonic() > begin_by
