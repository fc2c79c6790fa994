"""Keeping: room that is kept for the heads of lanes that were passed over for long. Pure: no I/O, no clock.

Called by `counting`, before the admission. Invariant: no place is kept for two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.engine.admission import Room, need_in


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A lane whose head has been passed over for longer than the set time, and the rooms that it needs.

    `need` and `needs` are as of a lane.
    """

    org_id: int
    lane_id: int
    since_us: int
    rooms: Sequence[Room]
    need: int = 1
    needs: Mapping[str, int] | None = None

    def cost(self, room: Room) -> int:
        """Return how many its head takes of a room."""
        return room.cost(need_in(room, self.need, self.needs))


def keep_rooms(waiting: Sequence[Waiting]) -> None:
    """Keep one of each room that the heads of lanes need which waited long; the longest wait goes first.

    In a room that only its own org uses, a place is kept for a head in any case, so that it gets one there at
    last. In rooms that other orgs use too it is kept only once all of the first have place for it: what an org has
    full of its own holds up nobody else. No place is kept that an older head needs, and of its own or of shared rooms
    a head keeps all or none: so the oldest keeps all of its own, and two never keep rooms from each other.
    """
    needed: set[int] = set()
    for one in sorted(waiting, key=lambda one: (one.since_us, one.org_id, one.lane_id)):
        own = [room for room in one.rooms if room.org_id == one.org_id]
        shared = [room for room in one.rooms if room.org_id != one.org_id]
        is_kept = _keep(own, one, needed)
        if is_kept and all(room.left >= one.cost(room) for room in own):
            _keep(shared, one, needed)


def _keep(rooms: Sequence[Room], one: Waiting, needed: set[int]) -> bool:
    """Keep these rooms for a head unless an older one needs one of them; returns whether they are kept."""
    ids = {id(room) for room in rooms}
    is_free = needed.isdisjoint(ids)
    if is_free:
        for room in rooms:
            room.kept_for, room.kept = (one.org_id, one.lane_id), one.cost(room)
    needed |= ids
    return is_free
