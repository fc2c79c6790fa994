"""Moved: what a claim writes of lanes, shares and clocks, and what it tells of each work item that it took. Pure.

Called by `claim`. Invariant: a lane's cursor never passes what is still ready there.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from collections.abc import Set as AbstractSet

from millpond.db.pool import Record
from millpond.engine.admission import Decision, Lane, Pick, Share
from millpond.engine.boarding import Called
from millpond.engine.charges import Toll
from millpond.engine.columns import plain, texts
from millpond.engine.crossings import Crossings
from millpond.engine.lanes import ALONE
from millpond.engine.leases import Claimed, Lease, Seat

# So many lanes of an org are read in one claim: `claim_heads` of the migrations.
MAX_LANES = 64
_END = 2**62
# Where a lane goes on, its cursor is stored with an item whose rank is a multiple of this, or of another second than
# the next; between these it is left as it was (`_STAYS`), and what was taken is passed over again: versions of its row,
# which stay while anybody's transaction is open, cost each look at it more than that.
_EVERY = 2048
_SECOND_US = 1_000_000
_STAYS = -1


def claimed(rows: Sequence[Record]) -> list[Claimed]:
    """Return what the claim's statements leased."""
    # One token object for all of them: the driver's ids keep their text once it was asked for.
    return [
        # Of a run the id of its work item is its own: one object, since many attempts are kept at a time.
        Claimed(
            Lease(row[0], row[1], row[1] if row[1] == row[2] else row[2], row[3], rows[0][4]),
            *row[5:],
        )
        for row in rows
    ]


def seated(one: Claimed, called: Mapping[tuple[int, uuid.UUID], Sequence[Called]]) -> Claimed:
    """Set which steps have room, for whose sake a run was taken."""
    steps = called.get((one.lease.org_id, one.lease.item_id), ())
    seats = tuple(Seat(step.step_key, step.since_us) for step in steps)
    return one._replace(seats=seats) if seats else one


def helped(claimed: list[Claimed], picks: Sequence[Pick]) -> list[Claimed]:
    """Set whose slot each has that other queues help."""
    helpers = {(one.org_id, one.item_id): one.helper for one in picks if one.helper}
    if not helpers:
        return claimed
    return [
        one._replace(helper=helpers.get((one.lease.org_id, one.lease.item_id))) for one in claimed
    ]


def unread(shares: Sequence[Share], orgs: Mapping[str, int]) -> set[str]:
    """Return the queues of which more may be ready than orgs and lanes were read."""
    counts = Counter([share.queue for share in shares])
    cut = {share.queue for share in shares if len(share.lanes) >= MAX_LANES}
    return cut | {queue for queue, most in orgs.items() if counts[queue] >= most}


def horizons(
    shares: Sequence[Share], orgs: Mapping[str, int], whole: Mapping[str, int]
) -> dict[str, tuple[float, int]]:
    """Return behind which org (virtual time, org) of a queue others may stand, where fewer than the whole were read.

    So many were read in order; one that was read beside them, for its interactive work, may stand anywhere.
    """
    places: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for share in shares:
        places[share.queue].append((share.virtual_s, share.org_id))
    return {
        queue: sorted(found)[orgs[queue] - 1]
        for queue, found in places.items()
        if len(found) >= orgs[queue] < whole[queue]
    }


def spread(
    shares: Sequence[Share], free: Mapping[str, int], horizons: Container[str] = ()
) -> dict[str, float]:
    """Return of how many orgs work was picked, over its work items, by queue, where there was enough of it.

    That is where it filled all free slots, and where not all orgs were read: in queues that have horizons.
    """
    took: Counter[str] = Counter()
    orgs: Counter[str] = Counter()
    for share in shares:
        if count := sum(lane.taken for lane in share.lanes):
            took[share.queue] += count
            orgs[share.queue] += 1
    return {
        queue: orgs[queue] / took[queue]
        for queue, slots in free.items()
        if slots > 0 and (took[queue] >= slots or (queue in horizons and took[queue]))
    }


def settled(shares: Sequence[Share], decision: Decision) -> list[str | list[str] | list[float]]:
    """Return what a claim writes of lanes, shares and clocks, as columns; those of lanes and shares are joined."""
    moved: list[tuple[int, int, int, bool]] = []
    changed: list[tuple[Share, bool]] = []
    for share in shares:
        # Where not all lanes of an org are read, those with the lowest cursors are.
        may_stay = len(share.lanes) < MAX_LANES and not any(one.is_urgent for one in share.lanes)
        lanes = [
            (share.org_id, one.lane_id, _cursor(one, may_stay=may_stay), _goes_on(one))
            for one in share.lanes
            if one.taken or one.was_full or (one.is_spent and one.is_whole)
        ]
        if lanes:
            moved += lanes
            changed.append((share, not any(goes_on for _, _, _, goes_on in lanes)))
    return [
        plain([org_id for org_id, _, _, _ in moved]),
        plain([lane_id for _, lane_id, _, _ in moved]),
        plain([cursor for _, _, cursor, _ in moved]),
        plain([goes_on for _, _, _, goes_on in moved]),
        plain([share.org_id for share, _ in changed]),
        texts([share.queue for share, _ in changed]),
        plain([share.virtual_s for share, _ in changed]),
        plain([maybe_empty for _, maybe_empty in changed]),
        list(decision.clocks),
        list(decision.clocks.values()),
    ]


def timed(
    claimed: list[Claimed], paced: AbstractSet[tuple[int, uuid.UUID]], begin_by: float
) -> list[Claimed]:
    """Set by when work begins that a rate let go."""
    if not paced:
        return claimed
    return [
        one._replace(begin_by=begin_by) if (one.lease.org_id, one.lease.item_id) in paced else one
        for one in claimed
    ]


def crossing(
    claimed: list[Claimed],
    shares: Sequence[Share],
    crossings: Crossings,
    run_of: Mapping[tuple[int, uuid.UUID], tuple[int, uuid.UUID]],
    step_of: Mapping[tuple[int, uuid.UUID], str],
) -> list[Claimed]:
    """Set through which crossings each goes, and what those of its steps are charged that have room."""
    if not crossings.met:
        return claimed
    names: dict[tuple[int, uuid.UUID], tuple[str, ...]] = {}
    tolls: dict[tuple[int, uuid.UUID, str], Toll] = {}
    for share in shares:
        for lane in share.lanes:
            rooms = crossings.tries(lane)
            for item in lane.items[: lane.taken]:
                own = (share.org_id, item)
                run = run_of.get(own, own)
                names[run] = crossings.names(lane)
                if rooms and lane.tries and own in step_of:
                    able = lane.able.rstrip(ALONE)
                    toll = Toll(share.queue, rooms, lane.tries[rooms[0]], able)
                    tolls[*run, step_of[own]] = toll
    return [
        one._replace(
            crossings=names.get((one.lease.org_id, one.lease.item_id), ()),
            seats=tuple(
                seat._replace(toll=tolls.get((one.lease.org_id, one.lease.item_id, seat.step_key)))
                for seat in one.seats
            ),
        )
        for one in claimed
    ]


def _goes_on(lane: Lane) -> bool:
    """Whether a lane stays in the active order: it may have more work, and room for it."""
    return lane.full is None and not (lane.is_spent and lane.is_whole)


def _cursor(lane: Lane, *, may_stay: bool) -> int:
    """Return the rank from which the lane is read next; everything before it is gone.

    An empty lane gets the highest one, since its next arrival brings its own. One under limits is always stored: it may
    not be active, as it is read beside those in line or was parked in an earlier round.
    """
    if not lane.is_spent:
        end = lane.ranks[lane.taken]
    elif lane.is_whole or not lane.ranks:
        return _END
    else:
        end = lane.ranks[-1]
    if may_stay and not lane.rooms and not lane.was_full and not _is_due(lane, end):
        return _STAYS
    return end


def _is_due(lane: Lane, end: int) -> bool:
    if not lane.taken or lane.ranks[0] // _SECOND_US != end // _SECOND_US:
        return True
    return any(rank % _EVERY == 0 for rank in lane.ranks[: lane.taken])
