"""Simulating: what the admission makes of given arrivals, on a virtual clock. Pure: no I/O, no clock.

Called by the command `limits simulate` and by `benchmarks.simulate`. Invariant: who goes, who is parked and who is
woken is decided by `admission`, `rules` and `rooms` alone, as in the claim of the product, and who is charged what by
`charges`; here are only time, slots and what the product keeps in tables.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, nan

from millpond.engine.admission import Share
from millpond.engine.charges import EVERY_S, Use
from millpond.engine.counting import weighed
from millpond.engine.crew import GATHER_S, Hand
from millpond.engine.heads import DEEPEST, READ, Org, Reader, led
from millpond.engine.lanes import offset_us
from millpond.engine.loads import Load, Outcome, Work
from millpond.engine.rules import Rules
from millpond.engine.spilling import Spill
from millpond.engine.standing import Line, Standing
from millpond.engine.tokens import Needs
from millpond.engine.turns import decide
from millpond.engine.urgency import LEAD_S, Urgency

# As in the product: what a claim reads at most, and how soon others look after work ended under which lanes stand.
_MAX_ORGS = 256
_PARKED_S = 0.1


def simulate(
    load: Load,
    workers: Sequence[Mapping[str, int]],
    *,
    rules: Rules | None = None,
    weights: Mapping[int, float] | None = None,
    spills: Sequence[Spill] = (),
    lead_s: float = LEAD_S,
) -> Outcome:
    """Let runs arrive and workers (slots by queue) serve them until nothing more can go.

    `spills` says of each worker, in their order, whom its idle slots help and what is kept and reserved of them; empty:
    nothing of any. Interactive work goes by `lead_s` before its turn; 0: as any other.
    """
    told = spills or [Spill()] * len(workers)
    crew = [Hand.of(slots, spill) for slots, spill in zip(workers, told, strict=True)]
    return _Simulation(load, crew, rules or Rules(), weights or {}, lead_s).run()


class _Simulation:
    def __init__(
        self,
        load: Load,
        crew: list[Hand],
        rules: Rules,
        weights: Mapping[int, float],
        lead_s: float,
    ) -> None:
        self._load = load
        self._lead_s = lead_s
        self._workers = crew
        self._rules = rules
        self._weights = weights
        self._clocks: dict[str, float] = {}
        self._standing = Standing(rules, self._clocks)
        self._now_s = 0.0
        self._lines: list[Line] = []
        self._line_of: list[Line | None] = [None] * len(load.works)
        self._by_work: dict[Work, Line] = {}
        self._shares: dict[tuple[str, int], Org] = {}
        self._orders: dict[str, list[tuple[float, int, int]]] = {}
        self._ends: list[tuple[float, int, int, str]] = []
        # What each run under way was charged, and how many tokens it has reserved.
        self._uses: dict[int, tuple[Use, int]] = {}
        self._urgent: dict[str, dict[int, Org]] = {}
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
                offset_us=offset_us(work.priority, work.urgency),
                places=places,
                keys=work.keys,
                need=weighed(Needs().need(work.capability, work.keys), places),
            )
            self._lines.append(line)
            place = (work.queue, work.org_id)
            if place not in self._shares:
                weight = self._weights.get(work.org_id, 1.0)
                self._shares[place] = Org(work.org_id, work.queue, weight)
        return line

    def _activate(self, line: Line) -> None:
        """Put a lane into the fair order, its org without credit for the time that it had none there."""
        share = self._shares[line.queue, line.org_id]
        if not share.lines:
            share.virtual_s = max(share.virtual_s, self._clocks.get(share.queue, 0.0))
            self._queue_up(share)
        share.add(line)
        if share.urgent:
            self._urgent.setdefault(share.queue, {})[share.org_id] = share

    def _queue_up(self, share: Org) -> None:
        order = self._orders.setdefault(share.queue, [])
        share.stamp += 1
        heapq.heappush(order, (share.virtual_s, share.org_id, share.stamp))

    def _first(self, queue: str) -> Org | None:
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
            ahead: list[Org] = []
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
        use, had = self._uses.pop(run)
        worker.charges.end(use, self._load.service_s[run])
        worker.estimates.learn(line.capability, self._load.service_s[run])
        worker.paces[queue].learn(self._load.service_s[run])
        self._out.until_s = self._now_s
        self._standing.leave(line, self._now_s, had, self._load.used.get(run))
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

        now_us = round(self._now_s * 1e6)
        for line in self._standing.begin(now_us, most, cost_s, worker.needs):
            self._activate(line)
        urgency = self._urgency(worker, now_us)
        read = self._read(worker, most, has_urgent=urgency is not None)
        took: list[tuple[str, str | None]] = []
        if read:
            unread = {queue for queue in most if self._orders.get(queue)}
            terms = replace(terms, clocks=self._clocks, unread=unread)
            shares = [share for _, share in read]
            decision = decide(shares, wanted, terms, self._standing.crossings, urgency)
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

    def _urgency(self, worker: Hand, now_us: int) -> Urgency | None:
        """Return what a claim keeps to of interactive work; None where there is none."""
        if self._lead_s <= 0 or not any(self._urgent.values()):
            return None
        return Urgency(lead_s=self._lead_s, now_us=now_us, owed=worker.owed, owing=worker.owing)

    def _read(
        self, worker: Hand, wanted: Mapping[str, int], *, has_urgent: bool
    ) -> list[tuple[Org, Share]]:
        """Take the orgs that come first out of their queues' orders, with the heads of their lanes.

        Also those that come first of the orgs with interactive work, as `claim_urgent` of the migrations does.
        """
        read: list[tuple[Org, Share]] = []
        for queue, slots in wanted.items():
            members: list[Org] = []
            while len(members) < min(slots, _MAX_ORGS) and (first := self._first(queue)):
                members.append(first)
            if not members:
                continue
            depth = max(2, min(DEEPEST, slots + 1, 2 * -(-slots // len(members))))
            depth = max(depth, min(slots + 1, READ // len(members)))
            reader = Reader(
                load=self._load, standing=self._standing, estimates=worker.estimates, depth=depth
            )
            read += [(one, reader.share(one, is_led=False)) for one in members]
            if has_urgent and (urgent := self._urgent.get(queue)):
                for one in led(urgent, min(slots, _MAX_ORGS), {one.org_id for one in members}):
                    one.stamp += 1  # it leaves the order, as the others did
                    read.append((one, reader.share(one, is_led=True)))
        return read

    def _start(self, line: Line, worker: Hand, nth_worker: int, queue: str) -> None:
        run = line.waiting.popleft()
        self._out.starts_s[run] = self._now_s
        worker.free[queue] -= 1
        heapq.heappush(
            self._ends, (self._now_s + self._load.service_s[run], run, nth_worker, queue)
        )
        estimate_s = worker.estimates.estimate_s(line.capability)
        use = worker.charges.begin(
            line.org_id, line.queue, estimate_s, self._now_s, self._standing.crossed(line)
        )
        self._uses[run] = use, line.cost
        self._settle_s = min(self._settle_s, self._now_s + EVERY_S)
        self._standing.take(line, self._now_s)

    def _settle(self, one: Org, share: Share) -> None:
        """Keep where a claim leaves an org and its lanes."""
        one.virtual_s = share.virtual_s
        for head in share.lanes:
            line = self._lines[head.lane_id]
            if head.full is not None or (head.is_spent and head.is_whole):
                one.drop(line)
            if line.places:
                self._standing.settle(line, head, one.virtual_s)
        if not one.urgent and (urgent := self._urgent.get(one.queue)):
            urgent.pop(one.org_id, None)
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
