"""Endings: what the end of a run sees to beyond its own rows, in the transaction of that end.

Called by `commit` for runs that a worker ends and by `operations` for runs that nobody executes.
Invariant: the caller has removed the live rows in this transaction, so that nothing is added to these
runs any more; locks are taken from a child up to its parent, never down.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.engine import remote
from millpond.engine.duties import Duty
from millpond.engine.waits import Readied, Wake, ready

_SQL = queries("endings")
_NEEDS = queries("needs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A run that ends in this transaction; `outcome` is succeeded, failed or cancelled."""

    org_id: int
    run_id: uuid.UUID
    duties: Duty
    outcome: str


async def see_to(con: Connection, ended: Sequence[Ended]) -> list[Readied]:
    """Do what the duties of ended runs ask for; returns other runs that may go on by it."""
    if waiting := [one for one in ended if Duty.WAITS in one.duties]:
        await con.execute(_SQL["drop_waits"], *_columns(waiting))
    if lined := [one for one in ended if Duty.LINES in one.duties]:
        await con.execute(_NEEDS["end_lines"], *_columns(lined))
    if holding := [one for one in ended if Duty.KEY in one.duties]:
        await con.execute(_SQL["free_keys"], *_columns(holding))
    if parents := [one for one in ended if Duty.CHILDREN in one.duties]:
        await con.execute(_SQL["cancel_children"], *_columns(parents))
        await remote.stop(con, *_columns(parents))
    if children := [one for one in ended if Duty.PARENT in one.duties]:
        return await _tell_parents(con, children)
    return []


async def _tell_parents(con: Connection, children: Sequence[Ended]) -> list[Readied]:
    """Record the ends of children in the joins that wait for them; returns the parents that waited."""
    rows = await con.fetch(_SQL["lock_parents"], *_columns(children))
    links = [(row["org_id"], row["child_id"], row["parent_id"], row["first_id"]) for row in rows]
    joined = await end_joins(con, links)
    resting = {
        (row["org_id"], row["parent_id"])
        for row in rows
        if row["state"] in ("waiting", "awaiting_input")
    }
    return await ready(
        con, [Wake(org_id=org_id, run_id=run_id) for org_id, run_id in sorted(joined & resting)]
    )


async def end_joins(
    con: Connection, links: Sequence[tuple[int, uuid.UUID, uuid.UUID, uuid.UUID]]
) -> set[tuple[int, uuid.UUID]]:
    """Record ended children in the steps that wait for them; returns the runs of these steps.

    A link is org, child that ended, parent, and the child that the parent had started, of which the ended
    one may be a successor. The caller holds the parents' live rows.
    """
    if not links:
        return set()
    rows = await con.fetch(
        _SQL["end_joins"], *(list(column) for column in zip(*links, strict=True))
    )
    return {(row["org_id"], row["run_id"]) for row in rows}


async def apart(
    con: Connection, runs: Sequence[tuple[int, uuid.UUID]]
) -> tuple[list[int], list[int]]:
    """Part runs that end into those without and those with a parent, by their positions.

    The first never wait for another run's lock while they hold their own; ended apart from the others,
    they close no circle.
    """
    rows = await con.fetch(_SQL["with_parent"], [org for org, _ in runs], [run for _, run in runs])
    children = {row["run_id"] for row in rows}
    without = [nth for nth, (_, run_id) in enumerate(runs) if run_id not in children]
    return without, [nth for nth, (_, run_id) in enumerate(runs) if run_id in children]


def _columns(ended: Sequence[Ended]) -> tuple[list[int], list[uuid.UUID]]:
    return [one.org_id for one in ended], [one.run_id for one in ended]
