"""Claim: one short transaction around admission moves ready work items to leases.

Called by the worker's claim loop. Invariants: one claim at a time per shard; only rows that its
delete returned are executed; it never waits for a lock that a caller can hold. Its commit is not
waited for on disk: a lost claim is only claimed again.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import replace

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import moved
from millpond.engine.admission import AS_EVER, Decision, Lane, Pick, Share, Terms, pass_over
from millpond.engine.boarding import LATE_S, Boarding
from millpond.engine.columns import plain
from millpond.engine.lanes import is_urgent
from millpond.engine.leases import Claimed
from millpond.engine.limiting import Limiter
from millpond.engine.needs import Answer, Ask
from millpond.engine.turns import decide
from millpond.engine.urgencies import Urgencies
from millpond.engine.urgency import LEAD_S, Urgency
from millpond.errors import LeaseLost

_SQL = queries("claim")
_MAX_ARRIVALS = 5000
_MAX_ORGS = 256
# How many more orgs are read than would do if work were spread as in the last claim: what is short then is claimed with
# what is free meanwhile, and is less than reading more each time.
_SPARE = 1.05
_FEW_MORE = 2
_ROUNDS = 3
_FIRST_DEPTH = 16
_DEEPEST = 512
# So many items are read of all lanes together before less is read of each than one org alone might be due.
_READ = 512
# A worker stopped in the middle of a claim keeps the claim's lock, and with it every other claim: within a statement
# that waits for it so long, between two of them until its session is ended.
_LIMIT_S = 3.0
_IDLE_S = 1.0
# How a claim at once went: `claim_at_once` of the migrations.
_GONE, _TOO_MUCH, _TAKEN = -1, 0, 1


class _Changed(Exception):
    """Limits were changed between a claim's look at them and its look at what is ready: it is undone, and made anew."""


class Claimer:
    """Claims for one worker; remembers how deep to read lanes.

    `expected` is what the last claim charged for a work item, in worker-seconds by capability.
    """

    def __init__(
        self,
        database: EngineDatabase,
        *,
        worker_id: uuid.UUID,
        capabilities: Sequence[str],
        estimate_s: Callable[[str], float],
        try_s: Callable[[str], float] | None = None,
        lead_s: float = LEAD_S,
    ) -> None:
        self._database = database
        self._claims = database.chain("claim", durable=False, limit_s=_LIMIT_S, idle_s=_IDLE_S)
        self._is_followed = False
        self._has_beyond: Callable[[Mapping[str, int]], bool] = lambda _: False
        self._worker_id = worker_id
        self._capabilities = list(capabilities)
        self._estimate_s = estimate_s
        self._depth = _FIRST_DEPTH
        self._lanes = 1
        # Of how many orgs the last claim took work, over its work items, by queue, where it was more items than orgs.
        self._spread: dict[str, float] = {}
        self.expected: dict[str, float] = {}
        self.limits = Limiter(self._capabilities, estimate_s, try_s)
        self._urgencies = Urgencies(lead_s)
        self._boarding = Boarding(self.limits, worker_id)
        # The process's time as the last claim began that went well: limits are known as they were then.
        self.looked_at = -math.inf
        # Whether all that was ready had room at the last claim, with some to spare, so that it may be so again.
        self._is_calm = True

    async def claim(
        self, free: Mapping[str, int], terms: Terms = AS_EVER, asks: Sequence[Ask] = ()
    ) -> tuple[list[Claimed], bool]:
        """Lease work for the free slots of each queue, and answer steps; also tells whether more could go at once.

        Raises LeaseLost when the worker's session is no more: such leases would be orphans at birth.
        """
        self._reach(sum(free.values()))
        self.expected = {}
        began = time.monotonic()
        self._boarding.begin(asks)
        try:
            if self._is_calm and not self.limits.is_on and not asks:
                await self.limits.begin(self._database)
                # Where all that is ready has room of its own nothing is to be decided of spill and reserve either.
                own = terms.unreserved(free)
                is_plain = terms.most(free).keys() <= own.keys()
                is_known = not self.limits.is_on  # by what `begin` read, too
                if is_known and is_plain and (found := await self._claim_at_once(own)) is not None:
                    self.looked_at = began
                    return found
            claimed, has_more = await self._decide(free, terms)
        except BaseException:
            self._depth = _FIRST_DEPTH  # what was read may have been too much to read in time
            self._spread.clear()
            self._boarding.begin(())
            raise
        got = Counter([one.queue for one in claimed])
        anyones = terms.unreserved(free).items()
        self._is_calm = not has_more and all(got[queue] < slots for queue, slots in anyones)
        return claimed, has_more

    @asynccontextmanager
    async def one_by_one(
        self, has_beyond: Callable[[Mapping[str, int]], bool]
    ) -> AsyncIterator[None]:
        """Claim again and again in this block: one that follows at once begins with the commit of the last.

        `has_beyond` tells whether there is enough room for another claim beside the slots that one is for.
        """
        self._is_followed, self._has_beyond = True, has_beyond
        try:
            yield
        finally:
            self._is_followed = False
            await self.rest()

    async def rest(self) -> None:
        """Hold no transaction open for the next claim: it is not to be at once."""
        await self._claims.close()

    @property
    def summons(self) -> AbstractSet[uuid.UUID]:
        """The workers for whose waiting steps the last claim left room: they shall claim soon."""
        return self._boarding.summons

    @property
    def answers(self) -> Mapping[Ask, Answer]:
        """What the last claim made of steps that asked for room; those that are not there ask again."""
        return self._boarding.answers

    async def _decide(self, free: Mapping[str, int], terms: Terms) -> tuple[list[Claimed], bool]:
        """Claim by decision, once the limits are known by which it is made."""
        may_undo = True
        for _ in range(_ROUNDS):
            began = time.monotonic()
            await self.limits.begin(self._database)
            try:
                found = await self._claim(free, terms, may_undo=may_undo)
            except _Changed:
                may_undo = False  # limits that are changed all the time hold up nobody
                continue
            if found is not None:
                self.looked_at = began
                return found
        self._boarding.begin(())
        return [], True

    async def _claim_at_once(self, free: Mapping[str, int]) -> tuple[list[Claimed], bool] | None:
        """Lease all that is ready in one message; None where more than has room is ready."""
        queues = [queue for queue, slots in free.items() if slots > 0]
        async with self._database.statement("claim_at_once") as con:
            told, *rows = await con.fetch(
                _SQL["at_once"],
                _MAX_ARRIVALS,
                self._worker_id,
                uuid.uuid4(),
                queues,
                [free[queue] for queue in queues],
                [min(free[queue], _MAX_ORGS) for queue in queues],
                self._capabilities,
                [self._expected_s(able) for able in self._capabilities],
                self._depth,
                self.limits.version,
            )
        arrivals, outcome = told["org_id"], told["attempt"]
        if outcome == _GONE:
            raise LeaseLost("this worker's session is gone")
        has_more = outcome != _TAKEN or arrivals >= _MAX_ARRIVALS
        self._is_calm = not has_more
        return None if outcome == _TOO_MUCH else (moved.claimed(rows), has_more)

    async def _claim(
        self, free: Mapping[str, int], terms: Terms, *, may_undo: bool
    ) -> tuple[list[Claimed], bool] | None:
        """Claim by the limits that are known; None when there are others, which the next round reads first."""
        most = terms.most(free)
        whole = {queue: min(slots, _MAX_ORGS) for queue, slots in most.items()}
        orgs = whole if terms.helps or self.limits.is_on else self._fewer(most, whole)
        queues = list(orgs)
        limits = self.limits
        async with self._claims as con:
            if limits.is_on and not await limits.open(con, most):
                return None
            consumed, *rows = await con.fetch(
                _SQL["heads"],
                _MAX_ARRIVALS,
                self._worker_id,
                queues,
                list(orgs.values()),
                self._capabilities,
                self._depth,
            )
            arrivals, is_alive = consumed["lane_id"], consumed["offset_us"]
            if not is_alive:
                raise LeaseLost("this worker's session is gone")
            if not limits.note(consumed, rows.pop()):
                if not limits.is_open:
                    return None
                if may_undo:
                    raise _Changed
            rows, urgency = self._urgencies.of(rows)
            if urgency is not None:
                self._spread.clear()
                if orgs != whole:
                    return None
            boarding = self._boarding
            if not rows:
                await boarding.look(con, free)
                await boarding.let_on(con)
                await limits.spend(con)
                await limits.crossings.close(con, [])
                return [], arrivals >= _MAX_ARRIVALS or limits.has_more
            boarding.note(rows)
            if limits.is_on:
                await limits.read(con, rows)
            shares = self._shares(rows, has_urgent=urgency is not None)
            await boarding.look(con, most, shares)
            if terms.helps or terms.reserved:
                terms = replace(
                    terms,
                    clocks=await self._clocks(con, terms),
                    unread=moved.unread(shares, orgs) if arrivals < _MAX_ARRIVALS else orgs.keys(),
                )
            if orgs != whole:
                terms = replace(terms, horizons=moved.horizons(shares, orgs, whole))
            decision, claimed, missed = await self._admit(con, shares, free, terms, urgency)
            if missed:
                await _step_back(con, missed)
            await boarding.let_on(con)
            if limits.is_on:
                run_of = boarding.run_of
                await limits.close(con, shares, run_of, boarding.step_of)
                paced = {run_of.get(one, one) for one in limits.paced(shares)}
                claimed = moved.timed(claimed, paced, limits.began + LATE_S)
                steps = boarding.step_of
                claimed = moved.crossing(claimed, shares, limits.crossings, run_of, steps)
            # Where room was left for steps of other workers, these claim next.
            is_idle = not (decision.picks or missed or decision.is_held_back or boarding.summons)
            has_more = decision.has_more or is_idle or arrivals >= _MAX_ARRIVALS or limits.has_more
            if self._is_followed and (has_more or self._goes_on(free, claimed)):
                self._claims.follow()
        self._adapt(sum(free.values()), len(rows), len(claimed), len(missed))
        self._spread = {} if urgency else moved.spread(shares, free, terms.horizons)
        return claimed, has_more

    def _goes_on(self, free: Mapping[str, int], claimed: Sequence[Claimed]) -> bool:
        """Whether the next claim is most likely at once: this one fills all that it is for, and there is more room."""
        return len(claimed) >= sum(free.values()) and self._has_beyond(free)

    async def _clocks(self, con: Connection, terms: Terms) -> dict[str, float]:
        if not terms.reserved:
            return {}
        rows = await con.fetch(_SQL["clocks"], list(terms.reserved))
        return {row["queue"]: row["virtual_s"] for row in rows}

    async def _admit(
        self,
        con: Connection,
        shares: Sequence[Share],
        free: Mapping[str, int],
        terms: Terms,
        urgency: Urgency | None,
    ) -> tuple[Decision, list[Claimed], list[Pick]]:
        """Decide and take; items that somebody holds locked are passed over for the next ones."""
        whole = Decision(picks=[], clocks={}, has_more=False)
        claimed: list[Claimed] = []
        missed: list[Pick] = []
        left = dict(free)
        run_of = self._boarding.run_of
        for nth in range(1, _ROUNDS + 1):
            decision = decide(shares, left, terms, self.limits.crossings.met, urgency)
            whole.picks += decision.picks
            whole.clocks |= decision.clocks
            whole.has_more, whole.is_held_back = decision.has_more, decision.is_held_back
            got = await self._take(con, shares, decision)
            claimed += got
            if len(got) == len(decision.picks):
                break
            taken = {(one.lease.org_id, one.lease.item_id) for one in got} | run_of.keys()
            skipped = [one for one in decision.picks if (one.org_id, one.item_id) not in taken]
            missed += skipped
            pass_over(shares, skipped, again=nth < _ROUNDS)
            for one in got:
                left[one.helper or one.queue] -= 1
        return whole, claimed, missed

    def _shares(self, rows: Sequence[Record], *, has_urgent: bool) -> list[Share]:
        shares: dict[tuple[str, int], Share] = {}
        depth, is_on = self._depth, self.limits.is_on
        for row in rows:
            queue, org_id, weight, virtual_s, lane_id, offset_us, able, ranks, items, _ = row
            share = shares.get((queue, org_id))
            if share is None:
                share = Share(queue=queue, org_id=org_id, weight=weight, virtual_s=virtual_s)
                shares[queue, org_id] = share
            lane = Lane(
                lane_id=lane_id,
                offset_us=offset_us,
                ranks=ranks or (),
                items=items or (),
                is_whole=len(items or ()) < depth,
                estimate_s=self._expected_s(able),
                able=able,
            )
            if has_urgent:
                lane.is_urgent = is_urgent(offset_us)
            if is_on:
                self._limit(lane, row)
            share.lanes.append(lane)
        return list(shares.values())

    def _limit(self, lane: Lane, row: Record) -> None:
        """Set what limits say of a lane: its rooms, and what its items take there."""
        limits = self.limits
        lane.rooms, lane.need = limits.rooms(row), limits.need(row)
        lane.needs, lane.tries = limits.reservations.needs(row), limits.tries(row)

    def _expected_s(self, able: str) -> float:
        """Return what a work item is charged in this claim; what is learned meanwhile changes nothing."""
        found = self.expected.get(able)
        if found is None:
            found = self.expected[able] = self._estimate_s(able)
        return found

    async def _take(
        self, con: Connection, shares: Sequence[Share], decision: Decision
    ) -> list[Claimed]:
        """Lease what was picked, and store where that leaves lanes and shares."""
        boarding = self._boarding
        picks = await boarding.call(con, decision.picks)
        boarding.charge_once(shares)
        rows = await con.fetch(
            _SQL["take"],
            plain([pick.org_id for pick in picks]),
            plain([pick.lane_id for pick in picks]),
            plain([pick.rank for pick in picks]),
            plain([pick.item_id for pick in picks]),
            self._worker_id,
            uuid.uuid4(),
            *moved.settled(shares, decision),
        )
        claimed = moved.claimed(rows)
        if boarding.called:
            leases = [one.lease for one in claimed]
            await boarding.seat_called(
                con, [(one.org_id, one.item_id, one.token) for one in leases]
            )
            claimed = [moved.seated(one, boarding.called) for one in claimed]
        return moved.helped(claimed, picks)

    def _reach(self, slots: int) -> None:
        """Read as much of each lane as one org alone might be due, where that is not too much of all of them.

        An org gets no more of a claim than was read of it, and others what it was due.
        """
        self._depth = max(self._depth, min(slots + 1, _READ // self._lanes))

    def _fewer(self, slots: Mapping[str, int], orgs: Mapping[str, int]) -> dict[str, int]:
        """Return of how many orgs to read heads where each may have several items at one turn, as at the last claim.

        Nobody goes from behind those that were read (`Terms.horizons`), and what is left for them is claimed next.
        """
        due = {queue: math.ceil(slots[queue] * self._spread.get(queue, 1.0)) for queue in orgs}
        return {
            queue: min(most, math.ceil(due[queue] * _SPARE) + _FEW_MORE)
            for queue, most in orgs.items()
        }

    def _adapt(self, slots: int, lanes: int, got: int, missed: int) -> None:
        """Read next time about twice what each lane can be expected to give, and one more than all of it at most.

        When what somebody holds locked stood before what could be had: then twice as deep as now.
        """
        is_short = missed > 0 and got < slots
        expected = min(slots + 1, 2 * -(-slots // max(1, lanes)))
        self._depth = max(2, min(_DEEPEST, 2 * self._depth if is_short else expected))
        self._lanes = max(1, lanes)


async def _step_back(con: Connection, left: Sequence[Pick]) -> None:
    """Let lanes be read again from what could not be taken."""
    orgs, lanes = [pick.org_id for pick in left], [pick.lane_id for pick in left]
    await con.execute(_SQL["step_back"], orgs, lanes, [pick.rank for pick in left])
    await con.execute(_SQL["wake_shares"], orgs, lanes)
