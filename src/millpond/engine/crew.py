"""Crew: the workers of a simulation: their slots, whom idle ones help, and when each claims. Pure: no I/O, no clock.

Made by `simulating`. Invariant: slots are counted, lent, kept and gathered as `slots` does in the product, on a virtual
clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from millpond.engine.admission import Terms
from millpond.engine.charges import Charges
from millpond.engine.estimates import Estimates, Pace
from millpond.engine.spilling import Spill
from millpond.engine.tokens import Needs

# As in the product: how soon a worker claims after a slot is free.
GATHER_S = 0.002
_PATIENCE = 5
_MANY = 32


@dataclass(eq=False, slots=True)
class Hand:
    """The slots of one worker, when it claims next, and what it has learned.

    `owed` and `owing` are what it remembers of `urgency`: whose turns the next ones are.
    """

    total: dict[str, int]
    free: dict[str, int]
    spill: Spill
    backlogged: set[str] = field(default_factory=set)
    estimates: Estimates = field(default_factory=Estimates)
    paces: defaultdict[str, Pace] = field(default_factory=lambda: defaultdict(Pace))
    charges: Charges = field(default_factory=Charges)
    needs: Needs = field(default_factory=Needs)
    owed: set[str] = field(default_factory=set)
    owing: set[tuple[str, int]] = field(default_factory=set)
    claim_s: float = inf

    @classmethod
    def of(cls, slots: Mapping[str, int], spill: Spill) -> Hand:
        """Return a worker with all its slots free; of what spills it has what is about its own slots."""
        own = Spill(
            helps={queue: helped for queue, helped in spill.helps.items() if queue in slots},
            keep=spill.keep,
            reserve={queue: count for queue, count in spill.reserve.items() if queue in slots},
        )
        return cls(dict(slots), dict(slots), own)

    def claim_by(self, at_s: float) -> None:
        """Claim at a time, unless it claims sooner anyway."""
        self.claim_s = min(self.claim_s, at_s)

    def wanted(self) -> dict[str, int]:
        """Return how many work items a claim now may bring, by queue, as `slots` does."""
        most = {queue: self.paces[queue].most(total) for queue, total in self.total.items()}
        return {queue: min(free, most[queue]) for queue, free in self.free.items() if free > 0}

    def freed(self, queue: str, now_s: float) -> None:
        """Claim again soon where more was waiting than there was room for: the sooner, the more slots are free."""
        if queue not in self.backlogged and not self.lends(queue):
            return
        free, total = self.free[queue], self.total[queue]
        if 4 * free >= total:
            self.claim_by(now_s)
        else:
            self.claim_by(now_s + GATHER_S * (1 if _MANY * free >= total else _PATIENCE))

    def lends(self, queue: str) -> bool:
        """Whether a queue has slots to lend to others that may have more work than they have room for."""
        helped = self.spill.helps.get(queue, ())
        return self.has_idle(queue) and not self.backlogged.isdisjoint(helped)

    def has_idle(self, queue: str) -> bool:
        """Whether a queue has a slot to lend."""
        return self.free[queue] > self.spill.kept(queue)

    def has_slot(self, queue: str, reserved: int = 0) -> bool:
        """Whether work of a queue may have a slot beyond what is reserved."""
        return self.free.get(queue, 0) > reserved or any(
            queue in helped and self.has_idle(helper) for helper, helped in self.spill.helps.items()
        )

    def note(
        self, wanted: Mapping[str, int], terms: Terms, took: Sequence[tuple[str, str | None]]
    ) -> None:
        """Remember which queues had no more room and so may have more work waiting, as `slots` does."""
        own = Counter([queue for queue, helper in took if helper is None])
        lent = Counter([helper for _, helper in took if helper is not None])
        for queue, slots in wanted.items():
            if own[queue] < slots - terms.reserved.get(queue, 0):
                self.backlogged.discard(queue)
            else:
                self.backlogged.add(queue)
        for queue, helped in terms.helps.items():
            if lent[queue] < wanted[queue] - own[queue] - terms.kept.get(queue, 0):
                self.backlogged.difference_update(helped)
            else:
                self.backlogged.update(helped)
