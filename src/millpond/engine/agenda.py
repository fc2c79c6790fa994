"""The agenda: what one look finds to be done for all, and the loops that wait for it.

Called by `upkeep`. Invariants: a look reads only, so that one which is lost is only made again; what was found waits
until its loop takes it, and what nobody has to do costs no message but the look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias, cast

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries

_SQL = queries("agenda")
# A look takes a millisecond.
_LIMIT_S = 2.0
# Who reads all leases comes by those that were, for as long as anybody's transaction is open: that takes ever longer,
# and is done again after so many times what it took, or so long.
_TIMES = 50
_MOST_S = 10.0

# By these names the statement `look` tells what there is.
Task: TypeAlias = Literal[
    "timers",
    "schedules",
    "groups",
    "chores",
    "spent",
    "usage",
    "dead",
    "meters",
    "brakes",
    "tokens",
    "lines",
    "crossings",
    "deltas",
    "suspects",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a look asks for beside what it always does.

    Whether sessions are over, and whether leases are left of such that are gone, what is rare, what runs spent on
    models and what they used of workers, and work in `queues` that is done alone by whoever has `abilities`.
    """

    dead: bool = False
    orphans: bool = False
    rare: bool = False
    spent: bool = False
    usage: bool = False
    abilities: list[str] | None = None
    queues: list[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a look found: the database's time, for how long it has been up, and when the next timer is due, if any.

    `workers` is how many can look, where it asked for what is rare.
    """

    now: datetime
    uptime_s: float
    due_s: float | None
    workers: int | None
    todo: frozenset[Task]


def let_be_s(took_s: float) -> float:
    """Return for how long whoever has read all leases, in so many seconds, does not do so again."""
    return min(_MOST_S, _TIMES * took_s)


async def look(database: EngineDatabase, question: Question) -> Seen:
    """Look what there is to be done; raises TimeoutError where somebody has one of the tables for themselves."""
    async with asyncio.timeout(_LIMIT_S), database.statement("look") as con:
        row = await con.fetchrow(
            _SQL["look"],
            question.dead,
            question.rare,
            question.abilities,
            question.queues,
            question.spent,
            question.usage,
            question.orphans,
        )
    assert row is not None
    return Seen(
        now=row["now"],
        uptime_s=row["uptime_s"],
        due_s=row["due_s"],
        workers=row["workers"],
        todo=frozenset(cast("list[Task]", row["todo"])),
    )


class Todo:
    """What was found and nobody has taken yet; for several loops, each of which takes tasks of its own."""

    def __init__(self) -> None:
        self._tasks: set[Task] = set()
        self._added = asyncio.Event()

    def add(self, tasks: Iterable[Task]) -> None:
        """Tell of what there is."""
        self._tasks.update(tasks)
        self._added.set()

    async def take(self, mine: AbstractSet[Task]) -> AbstractSet[Task]:
        """Wait until there is something of these, and take all of them that there are."""
        while not (found := self._tasks & mine):
            self._added.clear()
            await self._added.wait()
        self._tasks -= found
        return found
