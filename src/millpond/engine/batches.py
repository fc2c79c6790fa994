"""Batches: the writes that wait for a group commit, and how they are parted and put in order. Pure.

Called by `commit` and `storing`. Invariant: whatever a batch is parted into, the writes of one run keep
their order: steps go before ends.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from millpond.engine.leases import Lease
from millpond.engine.metering import Spent
from millpond.engine.payloads import is_big

# The order in which rows are locked.
_order = attrgetter("write.lease.item_id.bytes")
# Small enough that the disk works on one batch while the event loop makes the next, and large enough that a statement,
# which costs as much as fifteen of its writes, is shared by many.
MAX_WRITES = 200
MAX_BYTES = 4 * 1024 * 1024


class StepWrite(NamedTuple):
    """A step's record and its event; without `state` the event alone. JSON fields are text.

    `duration_s` counts from the start of the step's first try, `seq` is the step's place in its branch, `spent` what
    the try used on models; `has_room` gives back what the try held of limits. One that `is_new` is the result of a
    first try, `step.succeeded`, of which nothing can be recorded yet: if something is, that refuses the write.
    """

    lease: Lease
    step_key: str
    name: str
    event_kind: str
    event_data: str
    kind: str = "step"
    state: str | None = None
    output: str | None = None
    error: str | None = None
    tries: int = 1
    duration_s: float = 0.0
    seq: int | None = None
    spent: Sequence[Spent] = ()
    is_new: bool = False
    has_room: bool = False


class FinishWrite(NamedTuple):
    """A run's end: `outcome` is succeeded, failed or cancelled; `spent` what steps used that have no record of it.

    `last` is the result of its last step, stored with it: a result of a first try, with nothing that needs rows of its
    own.
    """

    lease: Lease
    outcome: str
    event_data: str
    output: str | None = None
    error: str | None = None
    spent: Sequence[Spent] = ()
    last: StepWrite | None = None


W = TypeVar("W", StepWrite, FinishWrite)


def columns(writes: Sequence[W]) -> dict[str, tuple[Any, ...]]:
    """Return what each field has of these writes, of which there is one at least, by name."""
    return dict(zip(writes[0]._fields, zip(*writes, strict=True), strict=True))


@dataclass(slots=True)
class Pending(Generic[W]):
    """A write and the future of whoever waits for it."""

    write: W
    done: asyncio.Future[None]


Steps = Sequence[tuple[int, StepWrite]]
Ends = Sequence[tuple[int, FinishWrite]]


@dataclass(slots=True)
class Batch:
    """Writes that are committed together."""

    steps: list[Pending[StepWrite]] = field(default_factory=list)
    ends: list[Pending[FinishWrite]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps) + len(self.ends)

    @property
    def has_more(self) -> bool:
        """Whether something needs rows of its own: a big value, what was spent on models, room given back."""
        for step in self.steps:
            write = step.write
            if write.spent or write.has_room or is_big(write.output):
                return True
        return any(end.write.spent or is_big(end.write.output) for end in self.ends)

    @property
    def numbered_ends(self) -> Ends:
        """The ends with their ordinals."""
        return [(nth, one.write) for nth, one in enumerate(self.ends, 1)]

    def fail(self, error: Exception) -> None:
        """Tell whoever waits that nothing of it is stored."""
        for step in self.steps:
            settle(step.done, error)
        for end in self.ends:
            settle(end.done, error)

    def sort(self) -> None:
        """Order writes by lease, which is the order in which their rows are locked."""
        self.steps.sort(key=_order)
        self.ends.sort(key=_order)

    def split(self) -> tuple[Batch, Batch]:
        """Take the first writes off; returns them and the rest."""
        steps, weight = _fitting(_weights(self.steps[: MAX_WRITES + 1]), MAX_WRITES, 0)
        if steps < len(self.steps):
            ends = 0  # they wait for the steps: those of their own runs may be among the rest
        else:
            most = MAX_WRITES - steps
            ends, _ = _fitting(_weights_of_ends(self.ends[: most + 1]), most, weight)
        return (
            Batch(self.steps[:steps], self.ends[:ends]),
            Batch(self.steps[steps:], self.ends[ends:]),
        )

    def parts(self) -> list[Batch]:
        """Part steps from ends: each is stored by one statement, which is a transaction by itself."""
        if self.steps and self.ends:
            return [Batch(steps=self.steps), Batch(ends=self.ends)]
        return [self]

    def halves(self) -> list[Batch]:
        """Part a batch that was refused."""
        if self.steps and self.ends:
            return self.parts()
        middle_s, middle_e = (len(self.steps) + 1) // 2, (len(self.ends) + 1) // 2
        return [
            Batch(self.steps[:middle_s], self.ends[:middle_e]),
            Batch(self.steps[middle_s:], self.ends[middle_e:]),
        ]

    @property
    def are_results(self) -> bool:
        """Whether these are results of first tries alone, with nothing that needs rows of its own."""
        return not self.ends and all(one.write.is_new for one in self.steps) and not self.has_more

    @property
    def numbered_steps(self) -> Steps:
        """The steps with their ordinals."""
        return [(nth, one.write) for nth, one in enumerate(self.steps, 1)]

    def layers(self, stored: Mapping[int, bool]) -> list[Steps]:
        """Part the steps that are not stored, numbered, so that each layer has one of a run at most."""
        if not stored and len({one.write.lease.item_id for one in self.steps}) == len(self.steps):
            return [[(nth, one.write) for nth, one in enumerate(self.steps, 1)]] * bool(self.steps)
        layers: list[list[tuple[int, StepWrite]]] = []
        depth: dict[tuple[int, uuid.UUID], int] = {}
        for nth, one in enumerate(self.steps, 1):
            if nth in stored:
                continue
            item = one.write.lease[:2]
            level = depth.get(item, 0)
            depth[item] = level + 1
            if level == len(layers):
                layers.append([])
            layers[level].append((nth, one.write))
        return list(layers)


def _fitting(weights: Sequence[int], most: int, weight: int) -> tuple[int, int]:
    """Count the first writes that fit in `most` and `MAX_BYTES`, at least one of a batch; returns their weight too."""
    if len(weights) <= most and (total := weight + sum(weights)) <= MAX_BYTES:
        return len(weights), total
    for nth, one in enumerate(weights):
        weight += one
        if nth >= most or (weight > MAX_BYTES and nth > 0):
            return nth, weight
    return len(weights), weight


def _weights(pending: Sequence[Pending[W]]) -> list[int]:
    """Return about how many bytes each write has."""
    return [len(one.write.output or "") + len(one.write.event_data) for one in pending]


def _weights_of_ends(ends: Sequence[Pending[FinishWrite]]) -> list[int]:
    lasts = [
        0 if (last := one.write.last) is None else len(last.output or "") + len(last.event_data)
        for one in ends
    ]
    return list(map(add, _weights(ends), lasts))


def settle(done: asyncio.Future[None], error: Exception | None) -> None:
    """Tell whoever waits how its write went, unless nobody waits any more."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
        done.exception()  # read here, so that a write nobody waits for is not reported as forgotten
