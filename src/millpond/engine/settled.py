"""Settled: what runs of a simulation had reserved of tokens, against what they used. Pure: no I/O, no clock.

Called by `standing`, in place of the tables that the product's claim reads and writes for tokens. Invariants: who had
reserved what is settled once, by the claim after its end, as `claim_tokens` of the migrations does; what is not known
to have been used stays at what was reserved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from millpond.engine.rules import Place
from millpond.engine.tokens import Needs, Used, carried, counts_under


class _End(NamedTuple):
    """How many tokens more than reserved a run used under one limit, or fewer; `used` is None where nobody knows."""

    place: Place
    capability: str
    delta: int
    used: int | None


class Settled:
    """What has ended and was not settled yet; `deltas` are those of the present claim, by room."""

    def __init__(self) -> None:
        self._ends: list[_End] = []
        self.deltas: Counter[str] = Counter()

    def end(
        self,
        capability: str,
        keys: Sequence[str],
        places: Iterable[Place],
        had: int,
        used: Sequence[Used] | None,
    ) -> None:
        """Note what a run used that ended, and had reserved so many; None where it is not known."""
        if used is None:
            return
        mine = carried(keys)
        for place in places:
            if not place.rule.is_of_tokens:
                continue
            found = [one for one in used if counts_under(place.room.key, mine, one.keys)]
            tokens = sum(one.tokens for one in found)
            is_lost = any(one.is_lost for one in found)
            has = max(had, tokens) if is_lost else tokens
            self._ends.append(_End(place, capability, has - had, None if is_lost else tokens))

    def take(self, needs: Needs) -> list[Place]:
        """Settle what has ended for a claim, which learns from it; returns the rooms in question."""
        self.deltas = Counter()
        places: dict[str, Place] = {}
        for place, capability, delta, used in self._ends:
            places[place.room.text] = place
            self.deltas[place.room.text] += delta
            if used is not None:
                needs.learn(capability, used)
        self._ends.clear()
        return list(places.values())
