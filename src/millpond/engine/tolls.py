"""Tolls: what tries of steps use of rooms that several queues need, from their claim to the settlement.

Kept by `riding` for one worker; what is owed then is counted by `charges`. Invariant: of what a claim charged for a try
each is used, or given back, once: at its record, as it is given up, or as its attempt is over. Where the answer of the
claim was lost, that is what it had charged.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from millpond.engine.charges import Charges, Toll, Use
from millpond.engine.leases import Claimed, Lease

_Id = tuple[int, uuid.UUID, uuid.UUID]  # org, work item and token of an attempt


class Tolls:
    """The tries of one worker that are charged, by attempt and step; `learn` is told how long work took."""

    def __init__(self, charges: Charges, learn: Callable[[str, float], None]) -> None:
        self._charges = charges
        self._learn = learn
        self._tries: dict[_Id, dict[str, tuple[Use, str] | None]] = {}

    def begin(self, lease: Lease, step_key: str, toll: Toll | None) -> None:
        """Count a try in that may begin."""
        if toll is not None:
            use = self._charges.begin_try(lease.org_id, toll, time.monotonic())
            self._tries.setdefault(_id(lease), {})[step_key] = use, toll.work

    def refund(self, org_id: int, toll: Toll | None) -> None:
        """Give back what was charged for a try that does not begin."""
        if toll is not None:
            self._charges.refund(org_id, toll)

    def end(self, lease: Lease, step_key: str, *, is_whole: bool = False) -> None:
        """Count a try out that has given its room back; nothing where none was charged.

        Of one that is recorded (`is_whole`) it is learned how long it took; others were cut short, or never began.
        """
        begun = self._tries.get(_id(lease))
        if begun is None or (found := begun.get(step_key)) is None:
            return
        begun[step_key] = None
        use, work = found
        used_s = time.monotonic() - use.began
        self._charges.end(use, used_s)
        if is_whole:
            self._learn(work, used_s)

    def over(self, claimed: Claimed) -> None:
        """Count all tries of an attempt out, and give back what was charged for those that it never came to."""
        if not self._tries and not claimed.seats:
            return
        lease = claimed.lease
        for step_key in self._tries.get(_id(lease), ()):
            self.end(lease, step_key)
        begun = self._tries.pop(_id(lease), {})
        for seat in claimed.seats:
            if seat.step_key not in begun:
                self.refund(lease.org_id, seat.toll)


def _id(lease: Lease) -> _Id:
    return lease.org_id, lease.item_id, lease.token
