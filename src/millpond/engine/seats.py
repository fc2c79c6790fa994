"""Seats: which tries of steps may begin with the room that a claim has left. Pure: no I/O, no clock.

Called by `boarding`. Invariants: a try takes what it needs in all its rooms or in none; it takes none that
somebody needs who stood in line for it and could go, nor one that is kept; one that is refused holds up nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.engine.admission import Room


@dataclass(kw_only=True, slots=True)
class Want:
    """A try that needs a place in each of `rooms`; `full` is the one for want of which it cannot begin.

    Where a room is weighed, it needs `need` there. Places that are kept for `place` are its own.
    """

    rooms: Sequence[Room]
    need: int = 1
    place: tuple[int, int] | None = None
    full: Room | None = None


def seat(wants: Sequence[Want], ahead: Mapping[str, int]) -> None:
    """Let those begin, in order, that have room in all their rooms beside what those `ahead` need, by room name."""
    for want in wants:
        want.full = next((room for room in want.rooms if not _has_place(room, want, ahead)), None)
        if want.full is None:
            for room in want.rooms:
                room.left -= room.cost(want.need)
                room.went += room.cost(want.need)
                if room.kept_for == want.place:
                    room.kept_for = None


def give_back(want: Want) -> None:
    """Take back what a try was given that cannot begin after all."""
    for room in want.rooms:
        room.left += room.cost(want.need)
        room.went -= room.cost(want.need)


def _has_place(room: Room, want: Want, ahead: Mapping[str, int]) -> bool:
    cost = room.cost(want.need)
    if room.kept_for is not None and room.kept_for == want.place:
        return room.left >= cost
    kept = 0 if room.kept_for is None else room.kept
    return room.left - kept - ahead.get(room.name, 0) >= cost
