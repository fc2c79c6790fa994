"""Pauses: an org holds its own queue, flow or all work; an operator holds a queue for every org.

Called by the API in an org transaction; the caller commits, then hints the queues. Invariants: what is
paused is accepted and stands queued, is not claimed, and keeps its place; what runs goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import NotFound, Transient

_SQL = queries("pauses")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What is paused: a queue, a flow, or with neither all work of an org.

    `is_for_everyone` is set for a queue that an operator pauses.
    """

    queue: str = ""
    flow: str = ""
    is_for_everyone: bool = False

    @property
    def kind(self) -> str:
        """What it is: everyone, queue, flow or org."""
        if self.is_for_everyone:
            return "everyone"
        return "queue" if self.queue else "flow" if self.flow else "org"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """A pause that holds."""

    scope: Scope
    paused_by: str
    reason: str
    paused_at: datetime

    @property
    def shown_by(self) -> str:
        """Who paused it, as orgs see it: an operator's name is not theirs to see."""
        return "operator" if self.scope.is_for_everyone else self.paused_by

    def holds(self, *, queue: str, flow: str | None = None) -> bool:
        """Whether it holds a queue's work, or of it only that of `flow`, where one is given.

        A step in another queue is of no flow: only pauses of its queue and of its org hold it.
        """
        if self.scope.flow:
            return self.scope.flow == flow
        return self.scope.queue in ("", queue)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """Whether a pause was lifted, and the queues to hint."""

    was_paused: bool
    queues: Sequence[str] = ()


async def pause(con: Connection, org_id: int, scope: Scope, subject: str, reason: str) -> Pause:
    """Pause a scope; one that is paused already keeps its pause, which is returned.

    Raises NotFound for a queue that nobody knows: a wrong name would hold nothing.
    """
    if scope.queue and not await con.fetchval(_SQL["knows_queue"], org_id, scope.queue):
        raise NotFound(
            f"no worker serves a queue {scope.queue}, and no flow names it",
            code="queue_not_found",
            param="name",
        )
    if scope.is_for_everyone:
        async with _without_org(con, org_id):
            await con.execute(_SQL["pause_queue"], scope.queue, subject, reason)
    else:
        await con.execute(_SQL["pause"], org_id, scope.queue, scope.flow, subject, reason)
    for one in await list_pauses(con, org_id):
        if one.scope == scope:
            return one
    raise Transient("somebody resumed it at the same time", retry_after_s=0.1)


async def resume(con: Connection, org_id: int, scope: Scope) -> Resumed:
    """Lift the pause of a scope; lifting none is no error."""
    if scope.is_for_everyone:
        async with _without_org(con, org_id):
            lifted = await con.fetchval(_SQL["resume_queue"], scope.queue)
        return Resumed(was_paused=lifted is not None, queues=[scope.queue])
    if await con.fetchval(_SQL["resume"], org_id, scope.queue, scope.flow) is None:
        return Resumed(was_paused=False)
    rows = await con.fetch(_SQL["arrive"], org_id, scope.queue, scope.flow)
    return Resumed(was_paused=True, queues=[row["queue"] for row in rows])


@contextlib.asynccontextmanager
async def _without_org(con: Connection, org_id: int) -> AsyncIterator[None]:
    """Leave the org for what is the platform's to change; an error ends the transaction, and with it all of that."""
    await con.execute(_SQL["leave_org"])
    yield
    await con.execute(_SQL["enter_org"], org_id)


async def list_pauses(con: Connection, org_id: int) -> list[Pause]:
    """Return what holds work of an org: its own pauses, and queues paused for everyone."""
    return [
        Pause(
            scope=Scope(queue=row[0], flow=row[1], is_for_everyone=row[2]),
            paused_by=row[3],
            reason=row[4],
            paused_at=row[5],
        )
        for row in await con.fetch(_SQL["pauses"], org_id)
    ]
