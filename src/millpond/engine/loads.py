"""Loads: what arrives in a simulation, and what became of it. Pure: no I/O, no clock.

Made by whoever simulates, filled in by `simulating`, summed up by `simulated`. Invariant: what is told of a run stands
at its place in all columns.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from millpond.engine.rules import RoomId
from millpond.engine.tokens import Used
from millpond.types import STANDARD, Urgency


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What runs have in common that stand in one lane."""

    org_id: int
    queue: str
    capability: str
    keys: tuple[str, ...] = ()
    priority: int = 0
    urgency: Urgency = STANDARD


@dataclass(kw_only=True, slots=True)
class Load:
    """Runs in the order of their arrival, as columns: when, how long each takes, and its place in `works`.

    `used` is what runs used of tokens, by their places; of one that is not there nobody knows.
    """

    works: list[Work] = field(default_factory=list)
    at_s: array[float] = field(default_factory=lambda: array("d"))
    service_s: array[float] = field(default_factory=lambda: array("d"))
    work: array[int] = field(default_factory=lambda: array("L"))
    used: dict[int, tuple[Used, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.at_s)

    def add(
        self, at_s: float, service_s: float, work: int, used: tuple[Used, ...] | None = None
    ) -> None:
        """Add a run that arrives not before those that were added."""
        if used is not None:
            self.used[len(self)] = used
        self.at_s.append(at_s)
        self.service_s.append(service_s)
        self.work.append(work)


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a load: when each run began (nan: never), and how long rooms were full.

    `until_s` is when the last run ended.
    """

    starts_s: array[float]
    until_s: float = 0.0
    claims: int = 0
    full_s: dict[RoomId, float] = field(default_factory=dict)
    most_in_use: dict[RoomId, int] = field(default_factory=dict)
