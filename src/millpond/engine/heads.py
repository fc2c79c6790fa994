"""Heads: what a claim of a simulation reads of an org and of the lanes that it has in a queue. Pure: no I/O, no clock.

Called by `simulating`, in place of `claim_heads` and `claim_urgent` of the migrations. Invariant: as many lanes and
runs are read as these would.
"""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import islice

from millpond.engine.admission import Lane, Share
from millpond.engine.estimates import Estimates
from millpond.engine.lanes import is_urgent
from millpond.engine.loads import Load
from millpond.engine.standing import Line, Standing

MAX_LANES = 64
DEEPEST = 512
READ = 512
_MAX_URGENT = 32
_NIL = (uuid.UUID(int=0),) * DEEPEST


@dataclass(eq=False, slots=True)
class Org:
    """An org in a queue; it stands in the queue's order while it has active lanes, once with its `stamp`.

    `urgent` are its active lanes of interactive work.
    """

    org_id: int
    queue: str
    weight: float
    virtual_s: float = 0.0
    stamp: int = 0
    lines: dict[int, Line] = field(default_factory=dict)
    urgent: dict[int, Line] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Count a lane as active."""
        line.is_active = True
        self.lines[line.lane_id] = line
        if is_urgent(line.offset_us):
            self.urgent[line.lane_id] = line

    def drop(self, line: Line) -> None:
        """Count a lane as active no more."""
        line.is_active = False
        del self.lines[line.lane_id]
        self.urgent.pop(line.lane_id, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads heads for one claim, so many runs deep."""

    load: Load
    standing: Standing
    estimates: Estimates
    depth: int

    def share(self, org: Org, *, is_led: bool) -> Share:
        """Return an org with the heads of its lanes; of one that `is_led` by interactive work of those and one more."""
        return Share(
            queue=org.queue,
            org_id=org.org_id,
            weight=org.weight,
            virtual_s=org.virtual_s,
            lanes=[self._head(line) for line in self._lines(org, is_led=is_led)],
        )

    def _lines(self, org: Org, *, is_led: bool) -> Iterable[Line]:
        most = 1 if is_led else MAX_LANES
        if len(org.lines) <= most:
            return org.lines.values()
        lines = [one for one in org.lines.values() if not (is_led and one.lane_id in org.urgent)]
        found = heapq.nsmallest(most, lines, key=self._rank)
        found += heapq.nsmallest(_MAX_URGENT, org.urgent.values(), key=self._rank)
        return {line.lane_id: line for line in found}.values()

    def _rank(self, line: Line) -> float:
        return self.load.at_s[line.waiting[0]] * 1e6 + line.offset_us

    def _head(self, line: Line) -> Lane:
        at_s = self.load.at_s
        ranks = [int(at_s[run] * 1e6) for run in islice(line.waiting, self.depth)]
        rooms = self.standing.rooms(line) if line.places else ()
        return Lane(
            lane_id=line.lane_id,
            offset_us=line.offset_us,
            ranks=ranks,
            items=_NIL[: len(ranks)],
            is_whole=len(ranks) < self.depth,
            estimate_s=self.estimates.estimate_s(line.capability),
            rooms=rooms,
            is_urgent=is_urgent(line.offset_us),
            need=line.cost,
        )


def led(orgs: Mapping[int, Org], most: int, but: AbstractSet[int]) -> list[Org]:
    """Return those that come first of the orgs with interactive work, without some."""
    first = heapq.nsmallest(most, orgs.values(), key=lambda one: (one.virtual_s, one.org_id))
    return [one for one in first if one.org_id not in but]
