"""Checkpoints: what every group of a context's calls stands on.

The base of `Context` and of the rooms that hold its calls. Invariant: a call finds its record before it
does anything, and what it waits for is recorded before its branch parks.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import NoReturn

from millpond.engine.branches import Branches
from millpond.engine.history import History, Recorded
from millpond.engine.leases import Claimed, Lease
from millpond.engine.performing import Performer
from millpond.engine.scope import Scope
from millpond.errors import Permanent

# A longer history would make every replay slow; `continue_as` begins a new one.
MAX_STEPS = 10_000


class Checkpoints(ABC):
    """One attempt's lease, records and strands, as the calls of its context use them."""

    _claimed: Claimed
    _lease: Lease
    _history: History
    _scope: Scope
    _branches: Branches
    _made: Performer | None
    org_id: int
    run_id: uuid.UUID

    @property
    def _performer(self) -> Performer:
        """What performs and records the steps of this attempt, made for the first of them: many runs have none."""
        if self._made is None:
            self._made = self._make(Performer)
        return self._made

    async def _catch_up(self) -> None:
        """Wait until what the flow was given is durable, before branches begin on it."""
        if self._made is not None:
            await self._made.catch_up()

    @abstractmethod
    def _make(self, kind: Callable[..., Performer]) -> Performer:
        """Make what performs steps."""

    @abstractmethod
    def _lookup(self, key: str, kind: str) -> Recorded | None:
        """Return what is recorded at a key; another kind of step there is an error."""

    async def _outcome_of(
        self,
        key: str,
        kind: str,
        begin: Callable[[], Awaitable[Recorded | None]],
        *,
        is_human: bool = False,
    ) -> Recorded:
        """Return how a wait ended; parks the current branch until it has.

        `begin` records the wait in a transaction of its own, and returns its end where it is over at once.
        """
        branch = self._branches.here()
        recorded = self._lookup(key, kind)
        if recorded is None:
            recorded = await self._performer.persist(begin)
        if recorded is None or recorded.state == "waiting":
            recorded = await self._branches.park(branch, key, is_human=is_human)
        return recorded


def refuse_more() -> NoReturn:
    """Raise Permanent: a run has more steps than one may have."""
    raise Permanent(
        f"a run has at most {MAX_STEPS:,} steps",
        code="too_many_steps",
        advice="go on in a fresh run by ctx.continue_as(input), or give parts to child runs",
    )
