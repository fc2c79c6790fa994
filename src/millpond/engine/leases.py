"""Leases: the right of a worker to one work item, and what it got with it.

Made by `claim`, named by every write of a worker. Invariant: a write under a lease that is gone writes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine.charges import Toll
from millpond.errors import LeaseLost
from millpond.types import Backing

_SQL = queries("commit")


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


class Seat(NamedTuple):
    """A step that has room for a try already, with its place in line until then; `toll` is what is charged for that."""

    step_key: str
    since_us: int
    toll: Toll | None = None


class Claimed(NamedTuple):
    """A leased work item with what the executor needs to run it; `input` is JSON text.

    A big input is None here and read apart. `queue` is the one it was claimed from; `step_key` is set for a step
    that executes in another queue than its run. `is_rerun`: it may have recorded steps before its first attempt.
    `begin_by`, of the process's own clock: after that it is not begun, since it was let go by a rate. `helper` is
    the queue whose slot it has, where that is not its own; `crossings` are the rooms that several queues need in which
    its org is charged for it. `seats` are its steps that have room for a try already.
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
    seats: tuple[Seat, ...] = ()

    @property
    def backing(self) -> Backing | None:
        """What the run's rights stand on; None where nothing is to be asked."""
        if self.stamp is None:
            return None
        return Backing(self.stamp, self.permission, self.lent, self.granted_by)


async def hold(con: Connection, lease: Lease) -> bool:
    """Lock the live row; returns whether cancel was asked, raises LeaseLost without a lease."""
    row = await con.fetchrow(_SQL["hold"], lease.org_id, lease.item_id, lease.token)
    if row is None:
        raise LeaseLost("the lease is gone")
    return bool(row["cancel_requested"])


async def hold_free(con: Connection, leases: Sequence[Lease]) -> dict[int, bool | None]:
    """Lock live rows in the order of group commits, waiting for none; tells of leases that hold, by position.

    Whether cancel was asked; None where somebody else has the row locked.
    """
    order = sorted(range(len(leases)), key=lambda nth: leases[nth].item_id.bytes)
    rows = await con.fetch(
        _SQL["hold_free"],
        order,
        [leases[nth].org_id for nth in order],
        [leases[nth].item_id for nth in order],
        [leases[nth].token for nth in order],
    )
    return {row["nth"]: row["cancel_requested"] for row in rows}
