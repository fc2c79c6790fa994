"""Bounds: how many branches of a fan go on at a time, and which of them have their places. Pure.

Kept by `fanning`; a claim takes places of a copy (`seats`), and so does whoever puts steps of a run into line
(`branches`), so that no more steps get room than branches can go on. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable


class Bound:
    """At most `limit` branches go on at a time: those that are `placed`."""

    __slots__ = ("limit", "placed")

    def __init__(self, limit: int, placed: Iterable[Hashable] = ()) -> None:
        self.limit = limit
        self.placed: set[Hashable] = set(placed)

    @property
    def has_place(self) -> bool:
        """Whether one more may go on."""
        return len(self.placed) < self.limit

    def has_for(self, branch: Hashable) -> bool:
        """Whether a branch has its place, or could take one."""
        return self.has_place or branch in self.placed


# The bounds above a branch, with the branch that needs a place in each.
Bounds = tuple[tuple[Bound, Hashable], ...]


class Copies:
    """Copies of bounds, one of each, of which places are taken for what is only decided."""

    def __init__(self) -> None:
        self._copies: dict[Bound, Bound] = {}

    def of(self, bounds: Bounds) -> Bounds:
        """Return copies of these bounds."""
        return tuple((self._copy(bound), branch) for bound, branch in bounds)

    def _copy(self, bound: Bound) -> Bound:
        found = self._copies.get(bound)
        if found is None:
            found = self._copies[bound] = Bound(bound.limit, bound.placed)
        return found


def take(bounds: Bounds) -> bool:
    """Take a place in each of these bounds, or none; whether they were taken."""
    if not all(bound.has_for(branch) for bound, branch in bounds):
        return False
    for bound, branch in bounds:
        bound.placed.add(branch)
    return True
