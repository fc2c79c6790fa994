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
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.admission import AS_EVER, Decision, Lane, Pick, Share, Terms, pass_over
from millpond.engine.boarding import LATE_S, Boarding, Called
from millpond.engine.columns import plain
from millpond.engine.crossings import Crossings
from millpond.engine.lanes import is_urgent
from millpond.engine.limiting import Limiter
from millpond.engine.needs import Answer, Ask
from millpond.engine.turns import decide
from millpond.engine.urgencies import Urgencies
from millpond.engine.urgency import LEAD_S, Urgency
from millpond.errors import LeaseLost
from millpond.types import Backing

_SQL = queries("claim")
_COMMIT = queries("commit")
_MAX_ARRIVALS = 5000
_MAX_ORGS = 256
# So many lanes of an org are read in one claim: `claim_heads` of the migrations.
_MAX_LANES = 64
_ROUNDS = 3
_FIRST_DEPTH = 16
_DEEPEST = 512
# So many items are read of all lanes together before less is read of each than one org alone might be due.
_READ = 512
# A worker stopped in the middle of a claim keeps the claim's lock, and with it every other claim: within a statement
# that waits for it so long, between two of them until its session is ended.
_LIMIT_S = 3.0
_IDLE_S = 1.0
_END = 2**62
# How a claim at once went: `claim_at_once` of the migrations.
_GONE, _TOO_MUCH, _TAKEN = -1, 0, 1


class Lease(NamedTuple):
    """The right of this worker to one work item; `token` fences every write under it."""

    org_id: int
    item_id: uuid.UUID
    run_id: uuid.UUID
    attempt: int
    token: uuid.UUID

    @property
    def is_of_step(self) -> bool:
        """Whether the work item is a step of a run, and not the run itself."""
        return self.item_id != self.run_id


class Claimed(NamedTuple):
    """A leased work item with what the executor needs to run it; `input` is JSON text.

    A big input is None here and read apart. `queue` is the one it was claimed from; `step_key` is set for a step
    that executes in another queue than its run. `is_rerun`: it may have recorded steps before its first attempt.
    `begin_by`, of the process's own clock: after that it is not begun, since it was let go by a rate. `helper` is
    the queue whose slot it has, where that is not its own; `crossings` are the rooms that several queues need in which
    its org is charged for it. `seats` are the keys of its steps that have room for a try already.
    """

    lease: Lease
    deaths: int
    tries: int
    cancel_requested: bool
    flow: str
    version: int
    queue: str
    input: str | None
    subject: str
    timeout_s: float | None
    deadline_at: datetime | None = None
    is_rerun: bool = False
    duties: int = 0
    kind: str = "run"
    step_key: str | None = None
    stamp: int | None = None
    permission: str | None = None
    lent: uuid.UUID | None = None
    granted_by: str | None = None
    begin_by: float | None = None
    helper: str | None = None
    crossings: tuple[str, ...] = ()
    seats: tuple[tuple[str, int], ...] = ()

    @property
    def backing(self) -> Backing | None:
        """What the run's rights stand on; None where nothing is to be asked."""
        if self.stamp is None:
            return None
        return Backing(self.stamp, self.permission, self.lent, self.granted_by)


async def hold(con: Connection, lease: Lease) -> bool:
    """Lock the live row; returns whether cancel was asked, raises LeaseLost without a lease."""
    row = await con.fetchrow(_COMMIT["hold"], lease.org_id, lease.item_id, lease.token)
    if row is None:
        raise LeaseLost("the lease is gone")
    return bool(row["cancel_requested"])


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
        lead_s: float = LEAD_S,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._capabilities = list(capabilities)
        self._estimate_s = estimate_s
        self._depth = _FIRST_DEPTH
        self._lanes = 1
        self.expected: dict[str, float] = {}
        self.limits = Limiter(self._capabilities, estimate_s)
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
                if is_plain and (found := await self._claim_at_once(own)) is not None:
                    self.looked_at = began
                    return found
            claimed, has_more = await self._decide(free, terms)
        except BaseException:
            self._depth = _FIRST_DEPTH  # what was read may have been too much to read in time
            self._boarding.begin(())
            raise
        got = Counter([one.queue for one in claimed])
        anyones = terms.unreserved(free).items()
        self._is_calm = not has_more and all(got[queue] < slots for queue, slots in anyones)
        return claimed, has_more

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
        for _ in range(_ROUNDS):
            began = time.monotonic()
            await self.limits.begin(self._database)
            if (found := await self._claim(free, terms)) is not None:
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
            )
        arrivals, outcome = told["org_id"], told["attempt"]
        if outcome == _GONE:
            raise LeaseLost("this worker's session is gone")
        has_more = outcome != _TAKEN or arrivals >= _MAX_ARRIVALS
        self._is_calm = not has_more
        return None if outcome == _TOO_MUCH else (_claimed(rows), has_more)

    async def _claim(
        self, free: Mapping[str, int], terms: Terms
    ) -> tuple[list[Claimed], bool] | None:
        """Claim by the limits that are known; None when there are others, which the next round reads first."""
        most = terms.most(free)
        orgs = {queue: min(slots, _MAX_ORGS) for queue, slots in most.items()}
        queues = list(orgs)
        limits = self.limits
        async with self._database.duty(
            "claim", durable=False, limit_s=_LIMIT_S, idle_s=_IDLE_S
        ) as con:
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
            if not limits.note(consumed):
                return None
            rows, urgency = self._urgencies.of(rows)
            boarding = self._boarding
            if not rows:
                await boarding.look(con, free)
                await boarding.let_on(con)
                await limits.spend(con)
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
                    unread=_unread(shares, orgs) if arrivals < _MAX_ARRIVALS else orgs.keys(),
                )
            decision, claimed, missed = await self._admit(con, shares, free, terms, urgency)
            if missed:
                await _step_back(con, missed)
            await boarding.let_on(con)
            if limits.is_on:
                run_of = boarding.run_of
                await limits.close(con, shares, run_of, boarding.step_of)
                paced = {run_of.get(one, one) for one in limits.paced(shares)}
                claimed = _timed(claimed, paced, limits.began + LATE_S)
                claimed = _crossing(claimed, shares, limits.crossings, run_of)
        self._adapt(sum(free.values()), len(rows), len(claimed), len(missed))
        # Where room was left for steps of other workers, these claim next.
        is_idle = not (decision.picks or missed or decision.is_held_back or boarding.summons)
        has_more = decision.has_more or is_idle or arrivals >= _MAX_ARRIVALS
        return claimed, has_more or limits.has_more

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
        for row in rows:
            queue, org_id, weight, virtual_s, lane_id, offset_us, able, ranks, items, _ = row
            share = shares.get((queue, org_id))
            if share is None:
                share = Share(queue=queue, org_id=org_id, weight=weight, virtual_s=virtual_s)
                shares[queue, org_id] = share
            share.lanes.append(
                Lane(
                    lane_id=lane_id,
                    offset_us=offset_us,
                    ranks=ranks or (),
                    items=items or (),
                    is_whole=len(items or ()) < self._depth,
                    estimate_s=self._expected_s(able),
                    rooms=self.limits.rooms(row) if self.limits.is_on else (),
                    is_urgent=has_urgent and is_urgent(offset_us),
                    need=self.limits.need(row) if self.limits.is_on else 1,
                    needs=self.limits.reservations.needs(row) if self.limits.is_on else None,
                )
            )
        return list(shares.values())

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
            *_settled(shares, decision),
        )
        claimed = _claimed(rows)
        if boarding.called:
            leases = [one.lease for one in claimed]
            await boarding.seat_called(
                con, [(one.org_id, one.item_id, one.token) for one in leases]
            )
            claimed = [_seated(one, boarding.called) for one in claimed]
        return _helped(claimed, picks)

    def _reach(self, slots: int) -> None:
        """Read as much of each lane as one org alone might be due, where that is not too much of all of them.

        An org gets no more of a claim than was read of it, and others what it was due.
        """
        self._depth = max(self._depth, min(slots + 1, _READ // self._lanes))

    def _adapt(self, slots: int, lanes: int, got: int, missed: int) -> None:
        """Read next time about twice what each lane can be expected to give, and one more than all of it at most.

        When what somebody holds locked stood before what could be had: then twice as deep as now.
        """
        is_short = missed > 0 and got < slots
        expected = min(slots + 1, 2 * -(-slots // max(1, lanes)))
        self._depth = max(2, min(_DEEPEST, 2 * self._depth if is_short else expected))
        self._lanes = max(1, lanes)


def _claimed(rows: Sequence[Record]) -> list[Claimed]:
    # One token object for all of them: the driver's ids keep their text once it was asked for.
    return [Claimed(Lease(row[0], row[1], row[2], row[3], rows[0][4]), *row[5:]) for row in rows]


def _seated(one: Claimed, called: Mapping[tuple[int, uuid.UUID], Sequence[Called]]) -> Claimed:
    """Set which steps have room, for whose sake a run was taken."""
    steps = called.get((one.lease.org_id, one.lease.item_id), ())
    seats = tuple((step.step_key, step.since_us) for step in steps)
    return one._replace(seats=seats) if seats else one


def _helped(claimed: list[Claimed], picks: Sequence[Pick]) -> list[Claimed]:
    """Set whose slot each has that other queues help."""
    helpers = {(one.org_id, one.item_id): one.helper for one in picks if one.helper}
    if not helpers:
        return claimed
    return [
        one._replace(helper=helpers.get((one.lease.org_id, one.lease.item_id))) for one in claimed
    ]


def _unread(shares: Sequence[Share], orgs: Mapping[str, int]) -> set[str]:
    """Return the queues of which more may be ready than orgs and lanes were read."""
    counts = Counter([share.queue for share in shares])
    cut = {share.queue for share in shares if len(share.lanes) >= _MAX_LANES}
    return cut | {queue for queue, most in orgs.items() if counts[queue] >= most}


def _settled(shares: Sequence[Share], decision: Decision) -> list[list[object]]:
    """Return what a claim writes of lanes, shares and clocks, as columns."""
    moved: list[tuple[int, Lane]] = []
    changed: list[tuple[Share, bool]] = []
    for share in shares:
        lanes = [
            one
            for one in share.lanes
            if one.taken or one.was_full or (one.is_spent and one.is_whole)
        ]
        if lanes:
            moved += [(share.org_id, lane) for lane in lanes]
            changed.append((share, any(not _goes_on(lane) for lane in lanes)))
    return [
        [org_id for org_id, _ in moved],
        [lane.lane_id for _, lane in moved],
        [_cursor(lane) for _, lane in moved],
        [_goes_on(lane) for _, lane in moved],
        [share.org_id for share, _ in changed],
        [share.queue for share, _ in changed],
        [share.virtual_s for share, _ in changed],
        [maybe_empty for _, maybe_empty in changed],
        list(decision.clocks),
        list(decision.clocks.values()),
    ]


def _timed(
    claimed: list[Claimed], paced: AbstractSet[tuple[int, uuid.UUID]], begin_by: float
) -> list[Claimed]:
    """Set by when work begins that a rate let go."""
    if not paced:
        return claimed
    return [
        one._replace(begin_by=begin_by) if (one.lease.org_id, one.lease.item_id) in paced else one
        for one in claimed
    ]


def _crossing(
    claimed: list[Claimed],
    shares: Sequence[Share],
    crossings: Crossings,
    run_of: Mapping[tuple[int, uuid.UUID], tuple[int, uuid.UUID]],
) -> list[Claimed]:
    """Set through which crossings each goes."""
    if not crossings.met:
        return claimed
    names = {
        run_of.get((share.org_id, item), (share.org_id, item)): crossings.names(lane)
        for share in shares
        for lane in share.lanes
        for item in lane.items[: lane.taken]
    }
    return [
        one._replace(crossings=names.get((one.lease.org_id, one.lease.item_id), ()))
        for one in claimed
    ]


def _goes_on(lane: Lane) -> bool:
    """Whether a lane stays in the active order: it may have more work, and room for it."""
    return lane.full is None and not (lane.is_spent and lane.is_whole)


def _cursor(lane: Lane) -> int:
    """Return the rank from which the lane is read next; everything before it is gone.

    An empty lane gets the highest one, since its next arrival brings its own.
    """
    if not lane.is_spent:
        return lane.ranks[lane.taken]
    return _END if lane.is_whole or not lane.ranks else lane.ranks[-1]


async def _step_back(con: Connection, left: Sequence[Pick]) -> None:
    """Let lanes be read again from what could not be taken."""
    orgs, lanes = [pick.org_id for pick in left], [pick.lane_id for pick in left]
    await con.execute(_SQL["step_back"], orgs, lanes, [pick.rank for pick in left])
    await con.execute(_SQL["wake_shares"], orgs, lanes)
