"""Fullness: what one look at queues, rooms and orgs adds to the time for which they were full. Pure: no I/O, no clock.

Called by `sampling`. Invariant: what is added to anything is at most the time since the look before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from millpond.types import Json


class Added(NamedTuple):
    """What is added to a queue, a room (by its name), an org (by its id), or the time of looking ('seen')."""

    kind: str
    name: str
    full_s: float
    waited_s: float = 0.0
    went: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSeen:
    """A queue at a look: slots of live workers, and how many work items each worker has taken so far.

    `waits`: work that could go stands ready.
    """

    name: str
    slots: int
    in_use: int
    waits: bool
    went: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What the look before saw: of each queue how much each worker had taken, and where work waited."""

    went: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    waits: Collection[str] = ()

    @classmethod
    def read(cls, seen: Json) -> Before:
        """Read what `kept` made; nothing of what is none."""
        return cls(went=seen.get("went", {}), waits=seen.get("waits", ()))


def kept(queues: Sequence[QueueSeen]) -> Json:
    """Return what the next look has to know of this one."""
    return {
        "went": {one.name: dict(one.went) for one in queues},
        "waits": [one.name for one in queues if one.waits],
    }


def of_queues(queues: Iterable[QueueSeen], before: Before, passed_s: float) -> list[Added]:
    """Return what is added to queues that had no free slot while work waited, with what they let go meanwhile.

    A claim fills a free slot within milliseconds. So a queue in which work waited at two looks in a row is
    full, also where a slot of it was just between two runs. Of a queue that was not seen before it is not known what it
    let go, so nothing of that time is counted.
    """
    return [
        Added("queue", one.name, passed_s, passed_s, _went(one, before.went.get(one.name, {})))
        for one in queues
        if one.waits
        and one.slots
        and one.name in before.went
        and (one.in_use >= one.slots or one.name in before.waits)
    ]


def _went(queue: QueueSeen, before: Mapping[str, int]) -> int:
    """Return how many a queue let go since; of a worker that is new nothing is known yet."""
    return sum(
        max(0, went - before[worker]) for worker, went in queue.went.items() if worker in before
    )


def of_rooms(full: Iterable[str], waiting: Collection[str], passed_s: float) -> list[Added]:
    """Return what is added to full rooms."""
    return [
        Added("room", name, passed_s, passed_s if name in waiting else 0.0) for name in sorted(full)
    ]


def of_orgs(org_ids: Iterable[int], passed_s: float) -> list[Added]:
    """Return what is added to orgs of which work stands under a full room."""
    return [Added("org", str(org_id), passed_s, passed_s) for org_id in sorted(org_ids)]
