"""Simulating: what the admission makes of given arrivals, on a virtual clock. Pure: no I/O, no clock.

Called by the command `limits simulate` and by `benchmarks.simulate`. Invariant: who goes, who is parked and who is
woken is decided by `admission`, `rules` and `rooms` alone, as in the claim of the product, and who is charged what by
`charges`; here are only time, slots and what the product keeps in tables.
"""

from __future__ import annotations

import heapq
import uuid
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf, nan

from millpond.engine.admission import Lane, Share
from millpond.engine.charges import EVERY_S, Use
from millpond.engine.counting import weighed
from millpond.engine.crew import GATHER_S, Hand
from millpond.engine.estimates import Estimates
from millpond.engine.lanes import offset_us
from millpond.engine.loads import Load, Outcome, Work
from millpond.engine.rules import Rules
from millpond.engine.spilling import Spill
from millpond.engine.standing import Line, Standing
from millpond.engine.tokens import Needs
from millpond.engine.turns import decide

# As in the product: what a claim reads at most, and how soon others look after work ended under which lanes stand.
_MAX_ORGS = 256
_MAX_LANES = 64
_DEEPEST = 512
_PARKED_S = 0.1
_NIL = (uuid.UUID(int=0),) * _DEEPEST


@dataclass(eq=False, slots=True)
class _Share:
    """An org in a queue; it stands in the queue's order while it has active lanes, once with its `stamp`."""

    org_id: int
    queue: str
    weight: float
    virtual_s: float = 0.0
    stamp: int = 0
    lines: dict[int, Line] = field(default_factory=dict)


def simulate(
    load: Load,
    workers: Sequence[Mapping[str, int]],
    *,
    rules: Rules | None = None,
    weights: Mapping[int, float] | None = None,
    spills: Sequence[Spill] = (),
) -> Outcome:
    """Let runs arrive and workers (slots by queue) serve them until nothing more can go.

    `spills` says of each worker, in their order, whom its idle slots help and what is kept and reserved of them; empty:
    nothing of any.
    """
    told = spills or [Spill()] * len(workers)
    crew = [Hand.of(slots, spill) for slots, spill in zip(workers, told, strict=True)]
    return _Simulation(load, crew, rules or Rules(), weights or {}).run()


class _Simulation:
    def __init__(
        self,
        load: Load,
        crew: list[Hand],
        rules: Rules,
        weights: Mapping[int, float],
    ) -> None:
        self._load = load
        self._workers = crew
        self._rules = rules
        self._weights = weights
        self._clocks: dict[str, float] = {}
        self._standing = Standing(rules, self._clocks)
        self._now_s = 0.0
        self._lines: list[Line] = []
        self._line_of: list[Line | None] = [None] * len(load.works)
        self._by_work: dict[Work, Line] = {}
        self._shares: dict[tuple[str, int], _Share] = {}
        self._orders: dict[str, list[tuple[float, int, int]]] = {}
        self._ends: list[tuple[float, int, int, str]] = []
        self._uses: dict[int, Use] = {}
        self._settle_s = inf
        self._out = Outcome(starts_s=array("d", [nan]) * len(load))

    def run(self) -> Outcome:
        """Go from event to event; at one time ends come first, then what is owed, arrivals, claims."""
        at_s, ends, workers = self._load.at_s, self._ends, self._workers
        nth, count = 0, len(self._load)
        while True:
            arrival_s = at_s[nth] if nth < count else inf
            end_s = ends[0][0] if ends else inf
            claimer = min(workers, key=_claim_s) if len(workers) > 1 else workers[0]
            if end_s <= min(arrival_s, claimer.claim_s, self._settle_s):
                if end_s == inf:
                    break
                self._now_s = end_s
                self._end(*heapq.heappop(ends)[1:])
            elif self._settle_s <= min(arrival_s, claimer.claim_s):
                self._now_s = self._settle_s
                self._charge()
            elif arrival_s <= claimer.claim_s:
                self._now_s = arrival_s
                self._arrive(nth)
                nth += 1
            else:
                self._now_s = claimer.claim_s
                claimer.claim_s = inf
                self._claim(claimer)
        self._out.full_s = self._standing.full_s
        self._out.most_in_use = self._standing.most_in_use
        return self._out

    def _arrive(self, run: int) -> None:
        number = self._load.work[run]
        line = self._line_of[number]
        if line is None:
            line = self._line_of[number] = self._line(self._load.works[number])
        line.waiting.append(run)
        if line.sleeps:
            return
        if not line.is_active:
            self._activate(line)
        queue = line.queue
        idle = max(self._workers, key=lambda one: (one.free.get(queue, 0), one.has_slot(queue)))
        if idle.has_slot(queue):
            idle.claim_by(self._now_s)

    def _line(self, work: Work) -> Line:
        line = self._by_work.get(work)
        if line is None:
            places = self._rules.places(work.org_id, work.queue, work.capability, work.keys)
            line = self._by_work[work] = Line(
                lane_id=len(self._lines),
                org_id=work.org_id,
                queue=work.queue,
                capability=work.capability,
                offset_us=offset_us(work.priority),
                places=places,
                need=weighed(Needs().need(work.capability, work.keys), places),
            )
            self._lines.append(line)
            place = (work.queue, work.org_id)
            if place not in self._shares:
                weight = self._weights.get(work.org_id, 1.0)
                self._shares[place] = _Share(work.org_id, work.queue, weight)
        return line

    def _activate(self, line: Line) -> None:
        """Put a lane into the fair order, its org without credit for the time that it had none there."""
        share = self._shares[line.queue, line.org_id]
        line.is_active = True
        if not share.lines:
            share.virtual_s = max(share.virtual_s, self._clocks.get(share.queue, 0.0))
            self._queue_up(share)
        share.lines[line.lane_id] = line

    def _queue_up(self, share: _Share) -> None:
        order = self._orders.setdefault(share.queue, [])
        share.stamp += 1
        heapq.heappush(order, (share.virtual_s, share.org_id, share.stamp))

    def _first(self, queue: str) -> _Share | None:
        """Take the org that comes first out of a queue's order; places that it has left since count nothing."""
        order = self._orders.get(queue)
        while order:
            _, org_id, stamp = heapq.heappop(order)
            share = self._shares[queue, org_id]
            if share.stamp == stamp:
                return share
        return None

    def _charge(self) -> None:
        """Move orgs by what they used beyond what their claims were charged, or less, as workers do."""
        for worker in self._workers:
            ahead: list[_Share] = []
            for (org_id, queue), owed_s in worker.charges.take(self._now_s).items():
                share = self._shares[queue, org_id]
                if owed_s < 0 and share.virtual_s >= self._clocks.get(queue, inf):
                    ahead.append(share)
                share.virtual_s += owed_s / share.weight
                if share.lines:
                    self._queue_up(share)
            for queue in dict.fromkeys(share.queue for share in ahead):
                self._take_back(queue, [one.virtual_s for one in ahead if one.queue == queue])
            for (org_id, queue, room), owed_s in worker.charges.take_crossed().items():
                self._standing.charge(org_id, room, owed_s / self._shares[queue, org_id].weight)
        is_idle = all(worker.charges.is_idle for worker in self._workers)
        self._settle_s = inf if is_idle else self._now_s + EVERY_S

    def _take_back(self, queue: str, given_s: list[float]) -> None:
        """Take a clock back that was pushed on by what is given back, as far as no org that waits was charged more."""
        clock_s = self._clocks[queue]
        if max(given_s) >= clock_s:
            return
        latest_s = max(given_s)
        for share in self._shares.values():
            if share.queue == queue and share.lines:
                if share.virtual_s >= clock_s:
                    return
                latest_s = max(latest_s, share.virtual_s)
        self._clocks[queue] = latest_s

    def _end(self, run: int, nth_worker: int, queue: str) -> None:
        line = self._line_of[self._load.work[run]]
        assert line is not None
        worker = self._workers[nth_worker]
        worker.free[queue] += 1
        worker.charges.end(self._uses.pop(run), self._load.service_s[run])
        worker.estimates.learn(line.capability, self._load.service_s[run])
        self._out.until_s = self._now_s
        self._standing.leave(line, self._now_s)
        worker.freed(queue, self._now_s)
        if self._standing.has_parked:
            worker.claim_by(self._now_s + GATHER_S)
            for other in self._workers:
                if other is not worker and any(other.free.values()):
                    other.claim_by(self._now_s + _PARKED_S)

    def _claim(self, worker: Hand) -> None:
        wanted = worker.wanted()
        if not wanted:
            return
        self._out.claims += 1
        terms = worker.spill.terms(worker.free, wanted)
        most = terms.most(wanted)

        def cost_s(line: Line) -> float:
            share = self._shares[line.queue, line.org_id]
            return worker.estimates.estimate_s(line.capability) / share.weight

        for line in self._standing.begin(round(self._now_s * 1e6), most, cost_s):
            self._activate(line)
        read = self._read(worker, most)
        took: list[tuple[str, str | None]] = []
        if read:
            unread = {queue for queue in most if self._orders.get(queue)}
            terms = replace(terms, clocks=self._clocks, unread=unread)
            shares = [share for _, share in read]
            decision = decide(shares, wanted, terms, self._standing.crossings)
            self._standing.spend(shares)
            for queue, clock_s in decision.clocks.items():
                self._clocks[queue] = max(self._clocks.get(queue, 0.0), clock_s)
            if not decision.picks and not decision.is_held_back:
                worker.claim_by(self._now_s)  # what was found full may leave room to others
            nth = self._workers.index(worker)
            for pick in decision.picks:
                line = self._lines[pick.lane_id]
                took.append((line.queue, pick.helper))
                self._start(line, worker, nth, pick.helper or line.queue)
            for one, share in read:
                self._settle(one, share)
        due_us = self._standing.end()
        if due_us is not None:
            for each in self._workers:
                each.claim_by(due_us / 1e6)
        worker.note(wanted, terms, took)
        self._go_on(most)

    def _read(self, worker: Hand, wanted: Mapping[str, int]) -> list[tuple[_Share, Share]]:
        """Take the orgs that come first out of their queues' orders, with the heads of their lanes."""
        read: list[tuple[_Share, Share]] = []
        for queue, slots in wanted.items():
            members: list[_Share] = []
            while len(members) < min(slots, _MAX_ORGS) and (first := self._first(queue)):
                members.append(first)
            if not members:
                continue
            depth = max(2, min(_DEEPEST, slots + 1, 2 * -(-slots // len(members))))
            read += [(one, self._share(one, worker.estimates, depth)) for one in members]
        return read

    def _share(self, one: _Share, estimates: Estimates, depth: int) -> Share:
        found = list(one.lines.values())
        if len(found) > _MAX_LANES:
            at_s = self._load.at_s
            found.sort(key=lambda line: at_s[line.waiting[0]] * 1e6 + line.offset_us)
        return Share(
            queue=one.queue,
            org_id=one.org_id,
            weight=one.weight,
            virtual_s=one.virtual_s,
            lanes=[self._head(line, estimates, depth) for line in found[:_MAX_LANES]],
        )

    def _head(self, line: Line, estimates: Estimates, depth: int) -> Lane:
        at_s = self._load.at_s
        ranks = [int(at_s[run] * 1e6) for run in islice(line.waiting, depth)]
        return Lane(
            lane_id=line.lane_id,
            offset_us=line.offset_us,
            ranks=ranks,
            items=_NIL[: len(ranks)],
            is_whole=len(ranks) < depth,
            estimate_s=estimates.estimate_s(line.capability),
            rooms=self._standing.rooms(line) if line.places else (),
            need=line.cost,
        )

    def _start(self, line: Line, worker: Hand, nth_worker: int, queue: str) -> None:
        run = line.waiting.popleft()
        self._out.starts_s[run] = self._now_s
        worker.free[queue] -= 1
        heapq.heappush(
            self._ends, (self._now_s + self._load.service_s[run], run, nth_worker, queue)
        )
        estimate_s = worker.estimates.estimate_s(line.capability)
        self._uses[run] = worker.charges.begin(
            line.org_id, line.queue, estimate_s, self._now_s, self._standing.crossed(line)
        )
        self._settle_s = min(self._settle_s, self._now_s + EVERY_S)
        self._standing.take(line, self._now_s)

    def _settle(self, one: _Share, share: Share) -> None:
        """Keep where a claim leaves an org and its lanes."""
        one.virtual_s = share.virtual_s
        for head in share.lanes:
            line = self._lines[head.lane_id]
            if head.full is not None or (head.is_spent and head.is_whole):
                line.is_active = False
                del one.lines[line.lane_id]
            if line.places:
                self._standing.settle(line, head, one.virtual_s)
        if one.lines:
            self._queue_up(one)

    def _go_on(self, queues: Iterable[str]) -> None:
        """Claim on where more waits than this claim took."""
        for queue in queues:
            if self._orders.get(queue):
                for one in self._workers:
                    if one.has_slot(queue, one.spill.reserve.get(queue, 0)):
                        one.claim_by(self._now_s)


def _claim_s(worker: Hand) -> float:
    return worker.claim_s
