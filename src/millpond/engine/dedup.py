"""Live keys: of the runs with one deduplication key, one is live at a time in an org.

Called by whoever submits with a key: the API, schedules, flows. Invariants: a run and the key that it
holds are stored in one transaction; keys are taken in one order; a run's live row is locked before
its key, as the end of a run does, so that these never wait for each other in a circle.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import operations
from millpond.errors import Conflict, NotFound, Transient
from millpond.types import Intent, RunState

_SQL = queries("dedup")
_ROUNDS = 5

OnDuplicate = Literal["reject", "join", "cancel_old"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The live run that holds a key; `labels` is JSON text."""

    key: str
    run_id: uuid.UUID
    flow: str
    version: int
    queue: str
    priority: int
    labels: str
    state: RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """Who has the key now: the new run, or `joined`, the live one.

    `replaced` is the run that it was taken from: cancelled, or asked to stop. The caller hints it.
    """

    joined: Holder | None = None
    replaced: uuid.UUID | None = None


async def take(con: Connection, org_id: int, intents: Sequence[Intent]) -> set[uuid.UUID]:
    """Take the free keys of runs about to be submitted; returns the ids of those that got theirs.

    Of several with one key the first gets it. Waits for transactions that take or free one of them.
    """
    keyed = [(intent.dedup_key, intent.run_id) for intent in intents if intent.dedup_key]
    if not keyed:
        return set()
    rows = await con.fetch(
        _SQL["take"], org_id, [key for key, _ in keyed], [run_id for _, run_id in keyed]
    )
    return {row["run_id"] for row in rows}


async def settle(con: Connection, intent: Intent, on_duplicate: OnDuplicate) -> Settled:
    """Get the key for one run about to be submitted, or find the live run that keeps it.

    `con` is in a transaction scoped to the intent's org; the caller submits in it unless `joined`.
    Raises Conflict (`duplicate_run`, with `run_id` in its details) under `reject`, and always when that run
    is of another flow: who may start this one may not be shown that one, let alone stop it.
    """
    key = intent.dedup_key
    assert key is not None
    replaced = None
    await con.execute(_SQL["line_up"], intent.org_id, key)
    for _ in range(_ROUNDS):
        if await take(con, intent.org_id, [intent]):
            return Settled(replaced=replaced)
        holder = await _holder(con, intent.org_id, key)
        if holder is None:
            continue
        if on_duplicate == "reject" or holder.flow != intent.flow:
            raise _duplicate(holder, is_of_flow=holder.flow == intent.flow)
        if on_duplicate == "join":
            return Settled(joined=holder)
        await _replace(con, intent, holder)
        replaced = holder.run_id
    raise Transient(f"many runs ask for the key {key} at once", retry_after_s=0.5)


async def _holder(con: Connection, org_id: int, key: str) -> Holder | None:
    """Return who holds a key; one left by a run that is no more is removed."""
    row = await con.fetchrow(_SQL["holders"], org_id, [key])
    if row is None:
        await con.execute(_SQL["free_orphan"], org_id, key)
        return None
    return Holder(**{**row, "state": RunState(row["state"])})


async def _replace(con: Connection, intent: Intent, holder: Holder) -> None:
    """Cancel the holder of a key and take the key from it; one that has just ended is left."""
    reason = f"replaced by run {intent.run_id}"
    try:
        await operations.cancel(con, intent.org_id, holder.run_id, intent.subject, reason)
    except (Conflict, NotFound):
        return
    await con.execute(_SQL["free"], intent.org_id, holder.key, holder.run_id)


def _duplicate(holder: Holder, *, is_of_flow: bool) -> Conflict:
    of = "" if is_of_flow else " of another flow"
    return Conflict(
        f"run {holder.run_id}{of} with this key is live",
        code="duplicate_run",
        param="dedup_key",
        advice="follow that run, or start with `on_duplicate` join or cancel_old"
        if is_of_flow
        else "use another key: those of one org are shared by its flows",
        details={"run_id": str(holder.run_id)},
    )
