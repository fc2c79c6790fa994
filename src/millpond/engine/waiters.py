"""Waiters: what a claim reads of steps that wait beside working branches, and of lanes that stand before them.

Called by `limiting` and `boarding`, within the claim's transaction and after its lock. Invariant: every claim that
looks at limits knows the first of those that wait, whichever worker has their runs.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.admission import Room
from millpond.engine.keeping import Waiting
from millpond.engine.lanes import ALONE
from millpond.engine.seats import Elder, Want

_SQL = queries("needs")
# Of a lane that stands before those that wait so many items are looked at.
_MAX_ITEMS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A step that waits under the lease of `item_id`: `who` names it, `place` is as whose room may be kept for it.

    `virtual_s` is how far its org has come in its queue; `offset_us` is that of the run's lane, `able` what that needs
    of a worker; `need` is what it takes of limits on tokens.
    """

    who: str
    item_id: uuid.UUID
    org_id: int
    queue: str
    since_us: int
    offset_us: int
    virtual_s: float
    rooms: Sequence[Room]
    place: tuple[int, int]
    able: str = ""
    need: int = 1

    @classmethod
    def of(cls, row: Record, rooms: Sequence[Room], nth: int, need: int) -> Asked:
        """Return a step as `claim_seated` tells of it, the nth of them."""
        return cls(
            who=row["room"],
            item_id=uuid.UUID(row["room"].partition(" ")[0]),
            org_id=row["org_id"],
            queue=row["queue"],
            since_us=row["us"],
            offset_us=row["lane_id"],
            virtual_s=row["n"] / 1e6,
            rooms=rooms,
            place=(row["org_id"], -nth),
            able=row["capability"].rstrip(ALONE),
            need=need,
        )

    @property
    def waiting(self) -> Waiting:
        """As what room may be kept for it."""
        return Waiting(
            org_id=self.org_id,
            lane_id=self.place[1],
            since_us=self.since_us,
            rooms=self.rooms,
            need=self.need,
        )

    @property
    def want(self) -> Want:
        """What it wants of a claim of another worker than its own: that its places are left for it."""
        return Want(
            rooms=self.rooms,
            org_id=self.org_id,
            queue=self.queue,
            since_us=self.since_us,
            offset_us=self.offset_us,
            virtual_s=self.virtual_s,
            able=self.able,
            need=self.need,
            place=self.place,
            is_here=False,
        )


def who_is(item_id: uuid.UUID, step_key: str) -> str:
    """Name a step under a lease, as `Asked` does."""
    return f"{item_id} {step_key}"


async def elders(
    con: Connection,
    wants: Sequence[Want],
    worker_id: uuid.UUID,
    queues: Sequence[str],
    use_s: Callable[[Record], float],
) -> list[Elder]:
    """Read which lanes stand under rooms that these want and that have place; the claim has slots for these queues.

    `use_s` is for how long an item of a lane is expected to use a room.
    """
    left = {
        room.name: room
        for want in wants
        if all(room.left >= room.cost(want.need) for room in want.rooms)
        for room in want.rooms
    }
    found: list[Elder] = []
    if names := [name for name, room in left.items() if not room.is_weighed]:
        most = min(_MAX_ITEMS, max(left[name].left for name in names))
        rows = await con.fetch(_SQL["elders"], names, worker_id, list(queues), most)
        found += [Elder(*row[:8])._replace(use_s=use_s(row) / row["weight"]) for row in rows]
    if weighed := {name: room.left for name, room in left.items() if room.is_weighed}:
        rows = await con.fetch(
            _SQL["elders_of_tokens"],
            list(weighed),
            worker_id,
            list(queues),
            _MAX_ITEMS,
            list(weighed.values()),
        )
        found += [Elder(*row) for row in rows]
    return found


async def drop_ghosts(con: Connection, asked: Sequence[Asked], worker_id: uuid.UUID) -> None:
    """Take those of these steps out of the line for which nobody waits in this worker, which has their runs."""
    await con.execute(
        _SQL["drop_ghosts"],
        [one.org_id for one in asked],
        [one.item_id for one in asked],
        [one.who.partition(" ")[2] for one in asked],
        worker_id,
    )


async def holders(con: Connection, asked: Sequence[Asked]) -> set[uuid.UUID]:
    """Return the workers that have the runs of these steps."""
    if not asked:
        return set()
    rows = await con.fetch(
        _SQL["holders"], [one.org_id for one in asked], [one.item_id for one in asked]
    )
    return {row["worker_id"] for row in rows}
