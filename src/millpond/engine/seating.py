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
from millpond.engine.leases import Lease, Seat
from millpond.engine.needs import Answer, Ask
from millpond.engine.plans import Plan
from millpond.engine.riding import Riding

Own = Callable[[Awaitable[Any]], Awaitable[Any]]
# Of an attempt that is closed so, what its steps have and wait for goes with its lease, or into their lines. Else the
# attempt goes on under its lease: it undoes what was done, or waits for its threads.
_GOES_BY_ITSELF = ("parked", "lost")


class Seating:
    """The room of one attempt's steps; `seats` are those for whose sake the run was claimed, with their places.

    Of these it tells the `branches`, where what their bounds let not begin now gives its room back.
    """

    def __init__(
        self,
        lease: Lease,
        riding: Riding,
        branches: Branches,
        *,
        seats: Iterable[Seat] = (),
        begin_by: float | None = None,
    ) -> None:
        self._lease = lease
        self._riding = riding
        self._branches = branches
        self._seats = {one.step_key: one for one in seats}
        self._left: dict[str, asyncio.Task[None]] = {}
        if self._seats:
            branches.seats = self
        self._begin_by = begin_by

    async def take(self, branch: Branch, plan: Plan, own: Own) -> float:
        """Have room for one try; returns for how many seconds that was waited for here.

        Raises InvalidInput where there never is any.
        """
        since_us = None
        if (seat := self._seats.pop(plan.key, None)) is not None:
            since_us = seat.since_us
            if (left := self._left.pop(plan.key, None)) is not None:
                await own(asyncio.shield(left))
            else:
                plan.is_seated = True
                self._riding.tolls.begin(self._lease, plan.key, seat.toll)
                if not _is_late(self._begin_by):
                    return 0.0
        elif not self._riding.concerns(self._lease.org_id, plan.how.keys):
            return 0.0
        began = time.monotonic()
        is_beside = self._branches.goes_beside(branch)
        ask = self._ask(plan.key, plan.how.keys, since_us, is_beside=is_beside)
        while True:
            if plan.is_seated:  # it came too late for the rate that let it go
                plan.is_seated = False
                self._riding.tolls.end(self._lease, plan.key)
                await own(asyncio.shield(self._riding.leave(ask)))
            answer = await self._wait(branch, plan, ask, own)
            plan.is_seated = answer.has_row
            if not _is_late(answer.begin_by):
                return time.monotonic() - began

    @property
    def keys(self) -> Iterable[str]:
        """The steps that have room which they have not come to."""
        return self._seats.keys() - self._left.keys()

    def give_back(self, step_keys: Iterable[str]) -> None:
        """Give back, uncharged, the room of steps that do not begin now; they ask anew where they stood in line."""
        for step_key in step_keys:
            seat = self._seats[step_key]
            self._riding.tolls.begin(self._lease, step_key, seat.toll)
            self._riding.tolls.end(self._lease, step_key)
            self._left[step_key] = self._riding.leave(self._ask(step_key))

    async def _wait(self, branch: Branch, plan: Plan, ask: Ask, own: Own) -> Answer:
        """Ride until the try may begin; the branch parks after the first answer that it may not."""
        rider = self._riding.ask(ask, branch, self._branches)
        try:
            answer: Answer = await own(rider.told)
            if answer.refusal is not None:
                raise answer.refusal
            while not answer.is_seated:
                if rider.answer is not None and rider.answer.is_seated:
                    return rider.answer
                await self._branches.park(branch, plan.key, is_human=False, ask=ask)
                if (
                    rider.left is not None
                ):  # it has a place in its bound by now, others had the room
                    await own(asyncio.shield(rider.left))
                    rider = self._riding.ask(ask, branch, self._branches)
                    answer = await own(rider.told)
                else:
                    assert rider.answer is not None
                    answer = rider.answer
                if answer.refusal is not None:  # the limit was lowered meanwhile
                    raise answer.refusal
            return answer
        finally:
            self._riding.forget(rider)
            if (last := rider.answer) is not None:
                has_room = last.is_seated and last.has_row
                plan.is_seated = has_room and self._branches.closed is None
                if plan.is_seated:
                    self._riding.tolls.begin(self._lease, plan.key, last.toll)
                else:
                    self._riding.tolls.refund(ask.org_id, last.toll)
                # It has room that it does not use, or may stand in line.
                has_place = has_room or (
                    not last.is_seated and (last.refusal is None or last.has_row)
                )
                if has_place and not plan.is_seated and not self._goes_by_itself:
                    self._riding.leave(ask)

    @property
    def _goes_by_itself(self) -> bool:
        return self._branches.closed in _GOES_BY_ITSELF

    def leave(self, plan: Plan) -> None:
        """Give back the room of a try of which nothing was recorded; the end of a lease does so by itself."""
        if plan.is_seated:
            plan.is_seated = False
            self._riding.tolls.end(self._lease, plan.key)
            if not self._goes_by_itself:
                self._riding.leave(self._ask(plan.key), is_told=not plan.spent)

    def recorded(self, plan: Plan) -> None:
        """Note that a record has given back the room of its try."""
        if plan.is_seated:
            plan.is_seated = False
            self._riding.tolls.end(self._lease, plan.key, is_whole=True)
            self._riding.freed()

    def _ask(
        self,
        step_key: str,
        keys: tuple[str, ...] = (),
        since_us: int | None = None,
        *,
        is_beside: bool = False,
    ) -> Ask:
        return Ask(
            org_id=self._lease.org_id,
            item_id=self._lease.item_id,
            token=self._lease.token,
            step_key=step_key,
            keys=keys,
            since_us=since_us,
            is_beside=is_beside,
        )


def _is_late(begin_by: float | None) -> bool:
    return begin_by is not None and time.monotonic() > begin_by
