"""Slots: how many attempts each queue of this worker may hold, and when it is time to claim again.

Called by the worker's loops, in one event loop. Invariants: no claim lets more attempts of a queue execute code than
it has slots, nor hold more than twice as many leases (one whose end was refused goes on beside them); a queue
that may have more work than it had room for is claimed again soon after a slot of it, or of one that helps it, is free;
others wait for a hint. An attempt counts in the queue whose slot it has, its time in the queue of its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from millpond.engine.admission import AS_EVER, Terms
from millpond.engine.charges import Charges, Use
from millpond.engine.estimates import Estimates, Pace
from millpond.engine.leases import Claimed
from millpond.engine.spilling import Spill, served_slots

# Freed slots gather for this long, so that one claim fills many of them; up to so many times while they are fewer
# than one of so many: a claim costs about as much as ten runs.
_GATHER_S = 0.002
_PATIENCE = 5
_MANY = 32
# Of so many capabilities others are told how long they take.
_MAX_TOLD = 50


class Slot:
    """The slot of one attempt, from its claim until its end is stored; its time is that of executing code."""

    __slots__ = (
        "_began",
        "_capability",
        "_crossings",
        "_expected",
        "_queue",
        "_slots",
        "_use",
        "_used_s",
        "_work_queue",
        "is_handed_over",
    )

    def __init__(
        self,
        slots: Slots,
        queue: str,
        work_queue: str,
        crossings: tuple[str, ...],
        expected: Mapping[str, float],
    ) -> None:
        self._slots = slots
        self._queue = queue
        self._work_queue = work_queue
        self._crossings = crossings
        self._expected = expected
        self._capability = ""
        self._began: float | None = None
        self._used_s = 0.0
        self._use: Use | None = None
        self.is_handed_over = False

    def start(self, org_id: int, capability: str) -> None:
        """Count time from now on: an attempt of an org, which needs that capability, has it."""
        self._capability = capability
        self._began = time.monotonic()
        self._use = self._slots.charges.begin(
            org_id, self._work_queue, self._charged_s(capability), self._began, self._crossings
        )

    def hand_over(self) -> None:
        """Let another attempt's code have it: of this attempt nothing is left but to store its end."""
        self._stop()
        if self._use is not None:
            # While its end is stored it uses nothing: what counted as used, many at a time, would hold its org up.
            self._slots.charges.end(self._use, self._used_s)
        self.is_handed_over = True
        self._slots.hand_over(self._queue)

    def take_again(self) -> None:
        """Have it after all, even if another has it by now: there is more to execute."""
        if self.is_handed_over:
            self.is_handed_over = False
            self._began = time.monotonic()
            if self._use is not None:
                self._slots.charges.go_on(self._use, self._used_s, self._began)
            self._slots.take_again(self._queue)

    def give(self) -> None:
        """Give it back."""
        if not self.is_handed_over:  # else it uses nothing any more
            self._stop()
            if self._use is not None:
                self._slots.charges.end(self._use, self._used_s)
        self._slots.give(
            self._queue, self._capability, self._used_s, is_handed_over=self.is_handed_over
        )

    def _stop(self) -> None:
        if self._began is not None:
            self._used_s += time.monotonic() - self._began
            self._began = None

    def give_unused(self, org_id: int, capability: str) -> None:
        """Give it back without an attempt, and to the org what its claim was charged."""
        if capability:
            charged_s = self._charged_s(capability)
            charges = self._slots.charges
            charges.give_back(org_id, self._work_queue, charged_s, self._crossings)
        self._slots.give_unused(self._queue)

    def _charged_s(self, capability: str) -> float:
        """Return what the claim charged for work of a capability."""
        found = self._expected.get(capability)
        return self._slots.estimate_s(capability) if found is None else found


class Slots:
    """Counts of one worker; `total` is slots by queue, `served` all queues whose work it takes, also with no slots.

    `spill` is what an operator says of them beyond their number.
    """

    def __init__(self, total: Mapping[str, int], spill: Spill | None = None) -> None:
        self.spill = spill or Spill()
        self.total = {queue: slots for queue, slots in total.items() if slots > 0}
        self.served = served_slots(self.total, self.spill)
        self._taken = dict.fromkeys(self.total, 0)
        self._ending = dict.fromkeys(self.total, 0)
        self._backlogged: set[str] = set()
        self._estimates = Estimates()
        self._tries = Estimates()
        self._paces = {queue: Pace() for queue in self.total}
        self._went: Counter[str] = Counter()
        self._kick = asyncio.Event()
        self._given = asyncio.Event()
        self._gathers = 0
        self.charges = Charges()
        self._awaited: frozenset[str] = frozenset()
        self._is_awaited = False

    def free(self) -> dict[str, int]:
        """Return free slots by queue, queues without any left out."""
        return {queue: free for queue in self.total if (free := self._free(queue)) > 0}

    def wanted(self) -> dict[str, int]:
        """Return how many work items the next claim may bring, by queue, queues without room left out."""
        return {
            queue: min(slots, self._paces[queue].most(self.total[queue]))
            for queue, slots in self.free().items()
        }

    def terms(self, wanted: Mapping[str, int]) -> Terms:
        """Return on what terms a claim for so many may fill them."""
        return self.spill.terms({queue: self._free(queue) for queue in wanted}, wanted)

    def _free(self, queue: str) -> int:
        total, taken = self.total[queue], self._taken[queue]
        return min(total - taken, 2 * total - taken - self._ending[queue])

    def used(self) -> dict[str, int]:
        """Return the slots in use by queue, queues without any left out."""
        return {queue: taken for queue, taken in self._taken.items() if taken > 0}

    def told(self) -> dict[str, Mapping[str, float]]:
        """Return what others may know: how many work items of each queue were taken so far, and how long one takes."""
        return {"went": dict(self._went), "took_s": self._estimates.newest(_MAX_TOLD)}

    def take(
        self,
        queue: str,
        helper: str | None = None,
        crossings: tuple[str, ...] = (),
        *,
        expected: Mapping[str, float] | None = None,
    ) -> Slot:
        """Count in an attempt at work of a queue, in a slot of its own or of the queue that helps it.

        Its time is charged to its org in the rooms `crossings` too. `expected` is what the claim charged for work, by
        capability; without it that is as of its start.
        """
        self._went[queue] += 1
        slot = Slot(self, helper or queue, queue, crossings, expected or {})
        self._taken[helper or queue] += 1
        return slot

    def give_unused(self, queue: str) -> None:
        """Count out what never became an attempt."""
        self._taken[queue] -= 1
        self._freed(queue)

    def hand_over(self, queue: str) -> None:
        """Count that an attempt has nothing more to execute."""
        self._taken[queue] -= 1
        self._ending[queue] += 1
        self._freed(queue)

    def take_again(self, queue: str) -> None:
        """Count that it has."""
        self._ending[queue] -= 1
        self._taken[queue] += 1

    def give(
        self, queue: str, capability: str, used_s: float, *, is_handed_over: bool = False
    ) -> None:
        """Count an attempt out and learn from how long it took."""
        self._estimates.learn(capability, used_s)
        self._paces[queue].learn(used_s)
        if not is_handed_over:
            self._taken[queue] -= 1
            self._freed(queue)
        else:
            ending = self._ending[queue]
            self._ending[queue] = ending - 1
            if ending >= self.total[queue]:  # else it had given room when it was handed over
                self._freed(queue)
        if capability in self._awaited:
            self._is_awaited = True
            if not self._gathers and not self._kick.is_set():
                self._gather()

    def _freed(self, queue: str) -> None:
        """Kick the claim at once when many slots are free, else after a moment."""
        self._given.set()
        if self._kick.is_set() or not self._may_have_work(queue):
            return
        if 4 * self._free(queue) >= self.total[queue]:
            self._kick.set()
        elif not self._gathers:
            self._gather()

    def estimate_s(self, capability: str) -> float:
        """Return the expected service of one work item, in worker-seconds."""
        return self._estimates.estimate_s(capability)

    def try_s(self, capability: str) -> float:
        """Return the expected use of one try of a step that needs keys, of a flow by its capability."""
        return self._tries.estimate_s(capability)

    def learn_try(self, capability: str, used_s: float) -> None:
        """Learn from how long such a try took."""
        self._tries.learn(capability, used_s)

    def expect(self) -> None:
        """Forget earlier reasons to claim: a claim begins now and sees what they told of."""
        self._kick.clear()
        self._is_awaited = False

    def note_claim(
        self, wanted: Mapping[str, int], claimed: Sequence[Claimed], terms: Terms = AS_EVER
    ) -> None:
        """Remember which queues had no more room and so may have more work waiting."""
        own = Counter([one.queue for one in claimed if one.helper is None])
        lent = Counter([one.helper for one in claimed if one.helper is not None])
        for queue, slots in wanted.items():
            if own[queue] < slots - terms.reserved.get(queue, 0):
                self._backlogged.discard(queue)
            else:
                self._backlogged.add(queue)
        for queue, helped in terms.helps.items():
            if lent[queue] < wanted[queue] - own[queue] - terms.kept.get(queue, 0):
                self._backlogged.difference_update(helped)
            else:
                self._backlogged.update(helped)
        for queue, slots in wanted.items():
            # Slots that are reserved stay free; they are no reason to claim again.
            least = 0 if own[queue] >= slots else self.spill.reserve.get(queue, 0)
            if self._lends(queue) or (queue in self._backlogged and self._free(queue) > least):
                self._freed(queue)

    def _may_have_work(self, queue: str) -> bool:
        """Whether work may wait that a free slot of a queue can have."""
        return queue in self._backlogged or self._lends(queue)

    def _lends(self, queue: str) -> bool:
        helped = self.spill.helps.get(queue)
        return (
            helped is not None
            and self._free(queue) > self.spill.kept(queue)
            and not self._backlogged.isdisjoint(helped)
        )

    def note_awaited(self, capabilities: frozenset[str]) -> None:
        """Remember of what work the end may give room on a key for which other work waits."""
        self._awaited = capabilities

    def free_room(self) -> None:
        """Claim soon where work waits for keys that others have: a step gave back what it had of them."""
        if self._awaited:
            self._is_awaited = True
            if not self._gathers and not self._kick.is_set():
                self._gather()

    def has_beyond(self, wanted: Mapping[str, int]) -> bool:
        """Whether so much is free beside the slots that a claim is for that another follows at once (`_freed`)."""
        return any(
            4 * (self._free(one) - slots) >= self.total[one] for one, slots in wanted.items()
        )

    @property
    def is_awoken(self) -> bool:
        """Whether there is a reason to claim."""
        return self._kick.is_set()

    def wake(self) -> None:
        """There is a reason to claim."""
        self._kick.set()

    async def wait(self, timeout_s: float) -> None:
        """Wait for a reason to claim, at most so long."""
        if self._kick.is_set():  # at once: the loop may have much to do before it comes back here
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._kick.wait()

    async def room(self) -> dict[str, int]:
        """Return free slots by queue, as soon as there are any; hints do not end this wait."""
        while not (free := self.free()):
            self._given.clear()
            await self._given.wait()
        return free

    def _gather(self) -> None:
        self._gathers += 1
        asyncio.get_running_loop().call_later(_GATHER_S, self._gathered)

    def _gathered(self) -> None:
        few = not self._is_awaited and all(
            _MANY * self._free(queue) < self.total[queue]
            for queue in self.total
            if self._may_have_work(queue)
        )
        if few and self._gathers < _PATIENCE and not self._kick.is_set():
            return self._gather()
        self._gathers = 0
        return self._kick.set()
