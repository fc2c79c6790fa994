"""Continuing: `ctx.continue_as` ends a run and starts its successor, both or neither.

A part of `Context`; the executor calls `hand_over` when the flow has unwound. Invariant: parent, live
key, priority, labels and deadline go over to the successor in the transaction of the end.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson
from pydantic import TypeAdapter

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.batches import FinishWrite
from millpond.engine.branches import Unwind
from millpond.engine.children import Children, encode_input
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.family import published
from millpond.engine.leases import Claimed, hold
from millpond.engine.storing import finish_with_duties
from millpond.engine.submit import submit
from millpond.engine.waits import Readied
from millpond.errors import Permanent
from millpond.types import Intent, Origin, Parent

_SQL = queries("children")
_GO_OVER = Duty.PARENT | Duty.KEY
# A successor whose time is already over is ended by its deadline, not refused here.
_LEAST_S = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """How a run goes on as another: its input as JSON, and its version where that is another."""

    input: bytes
    version: int | None


class Continuing(Children):
    """The call that begins anew without a history."""

    _continuation: Continuation | None
    _input_type: TypeAdapter[Any] | None

    async def continue_as(self, input: Any = None, *, version: int | None = None) -> NoReturn:
        """End this run as succeeded and go on as a fresh one of the same flow; never returns.

        The successor has no history; it takes over parent, labels, priority, keys and deadline. Children
        are treated as at any end. Call it from the flow's own strand; `version` names another version.
        """
        if self._branches.here().path:
            raise Permanent("continue_as was called inside a branch", code="continue_in_branch")
        text = encode_input(self._input_type if version is None else None, input)
        await self.settle_children()
        await self._catch_up()
        self._continuation = Continuation(input=text, version=version)
        self._branches.close("continued")
        raise Unwind("continued")

    @property
    def continuation(self) -> Continuation | None:
        """How the run goes on, once `continue_as` was called."""
        return self._continuation


async def hand_over(
    database: EngineDatabase, claimed: Claimed, continuation: Continuation, duration_s: float
) -> list[Readied] | None:
    """End a run and submit its successor; None when the run was asked to cancel instead."""
    lease = claimed.lease
    org_id, run_id = lease.org_id, lease.run_id
    async with database.duty("continue") as con:
        if await hold(con, lease):
            return None
        lineage = await con.fetchrow(_SQL["lineage"], org_id, run_id)
        assert lineage is not None
        intent = await _successor(con, claimed, continuation, lineage)
        fact = Fact("run.continued", None, {"run_id": str(intent.run_id)})
        await append(con, org_id, run_id, [fact])
        await submit(con, [intent])
        await con.execute(_SQL["hand_on"], org_id, run_id, intent.run_id, int(_GO_OVER))
        end = FinishWrite(
            lease=lease,
            outcome="succeeded",
            output="null",
            event_data=f'{{"duration_s":{duration_s:.6f}}}',
        )
        _, readied = await finish_with_duties(con, [(1, end)])
    return [Readied(org_id=org_id, run_id=intent.run_id, queue=intent.queue), *readied]


async def _successor(
    con: Connection, claimed: Claimed, continuation: Continuation, lineage: Record
) -> Intent:
    version, timeout_s = claimed.version, lineage["timeout_s"]
    if continuation.version is not None:
        found = await published(con, claimed.flow, continuation.version)
        version, timeout_s = found["version"], found["timeout_s"]
    left_s = lineage["left_s"]
    return Intent(
        org_id=claimed.lease.org_id,
        flow=claimed.flow,
        version=version,
        queue=lineage["queue"],
        input=continuation.input,
        subject=lineage["subject"],
        priority=lineage["priority"],
        keys=lineage["keys"],
        timeout_s=timeout_s,
        traceparent=lineage["traceparent"],
        labels=orjson.loads(lineage["labels"]),
        deadline_s=None if left_s is None else max(left_s, _LEAST_S),
        dedup_key=lineage["dedup_key"],
        parent=_parent(lineage),
        origin=Origin(run_id=claimed.lease.run_id, kind="continued"),
        backing=claimed.backing,
        behind=lineage["behind"] or (),
        urgency=lineage["urgency"],
    )


def _parent(lineage: Record) -> Parent | None:
    parent_id: uuid.UUID | None = lineage["parent_id"]
    if parent_id is None:
        return None
    return Parent(
        run_id=parent_id,
        step_key=lineage["parent_key"],
        close_policy=lineage["close_policy"],
    )
