"""Spilling: what an operator says of a worker's slots beyond their number. Pure: no I/O, no clock.

Composed by `cli`, kept by `slots`, put to each claim as `Terms` of the admission. Invariants: no queue helps itself;
what is kept or reserved of a queue's slots counts all of its free ones, also those for which a claim does not ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millpond.engine.admission import Terms


@dataclass(frozen=True, kw_only=True, slots=True)
class Spill:
    """Which queues' idle slots may execute work of which others, and which slots are not for everybody.

    `helps` names, by queue, the others that it helps, in order. A queue lends no slot unless it has `keep` free ones
    beside it. `reserve` are the last free slots of a queue, for orgs that are not above their share there; they are
    not lent either.
    """

    helps: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    reserve: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is said of slots beyond their number."""
        return bool(self.helps or self.keep or self.reserve)

    @property
    def helped(self) -> set[str]:
        """The queues that others help."""
        return {queue for helped in self.helps.values() for queue in helped}

    def kept(self, queue: str) -> int:
        """Return how many slots of a queue have to be free beside one that it lends."""
        return max(self.keep.get(queue, 0), self.reserve.get(queue, 0))

    def terms(self, free: Mapping[str, int], wanted: Mapping[str, int]) -> Terms:
        """Return the terms of a claim that asks for so many of so many free slots."""
        if not self.helps and not self.reserve:
            return Terms()
        beyond = {queue: free[queue] - slots for queue, slots in wanted.items()}
        return Terms(
            # A queue with slots left of its own is not asked for all that it could do: it gets no help before it is.
            helps={
                queue: [one for one in helped if beyond.get(one, 0) <= 0]
                for queue, helped in self.helps.items()
                if queue in wanted
            },
            kept={queue: max(0, self.kept(queue) - more) for queue, more in beyond.items()},
            reserved={
                queue: slots - beyond[queue]
                for queue, slots in self.reserve.items()
                if slots > beyond.get(queue, slots)
            },
        )


def served_slots(slots: Mapping[str, int], spill: Spill) -> dict[str, int]:
    """Return all queues whose work a worker takes, with the slots of their own: 0 for one that is only helped."""
    return {**dict.fromkeys(sorted(spill.helped), 0), **slots}
