"""Checking: recorded histories compared with the flow code of this process, before that code is deployed.

Called by `millpond flows check` and by tests of recorded histories. Invariant: it only reads; no step is
executed.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from millpond.db.pool import EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import history
from millpond.engine.encoding import dump_error
from millpond.engine.history import History, Mismatch
from millpond.engine.leases import Claimed, Lease
from millpond.engine.plans import StepFailed
from millpond.engine.registry import Flow
from millpond.engine.replaying import Rehearsal
from millpond.engine.scope import Scope

_SQL = queries("checking")
_BATCH = 20
# Nothing is there to write with, so that a replay cannot.
_NOTHING: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Whether code goes the way of a history, as far as that goes.

    `mismatch` is where it does not; `error` is what the code raised by itself on that way.
    """

    mismatch: Mismatch | None = None
    error: Exception | None = None

    @property
    def result(self) -> Literal["ok", "mismatch", "raised"]:
        """What to say of it in one word; an error after the last record is the flow's own affair."""
        if self.mismatch is not None:
            return "mismatch"
        return "ok" if self.error is None else "raised"

    def __str__(self) -> str:
        error = self.error
        raised = "" if error is None else f"the code raised {type(error).__name__}: {error}"
        return "; ".join(part for part in (str(self.mismatch or ""), raised) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One run as compared with the code; `steps` is how many checkpoints it has recorded."""

    org_id: int
    run_id: uuid.UUID
    flow: str
    version: int
    state: str
    steps: int
    comparison: Comparison


async def compare(
    flow: Flow,
    claimed: Claimed,
    recorded: History,
    resources: Mapping[type, object],
    failure: str | None = None,
) -> Comparison:
    """Replay a history by a flow; the flow may ask for `resources` outside its steps.

    `failure` is the error with which the run failed, as JSON text: the same again is no fault.
    """
    scope = Scope(
        database=_NOTHING,
        committer=_NOTHING,
        hints=_NOTHING,
        settler=_NOTHING,
        deltas=_NOTHING,
        family=_NOTHING,
        resting=_NOTHING,
        placing=_NOTHING,
        throttling=_NOTHING,
        riding=_NOTHING,
        worker_id=uuid.UUID(int=0),
        resources=resources,
    )
    rehearsal = Rehearsal(flow, claimed, recorded, scope)
    replayed = await rehearsal.replay()
    error = replayed.error
    if replayed.outcome == "ended" and replayed.reason != "continued":
        error = TimeoutError("the flow's code did not come to its next step")
    is_own = error is not None and not isinstance(error, StepFailed) and not _is(error, failure)
    return Comparison(mismatch=rehearsal.mismatch, error=error if is_own else None)


async def check(
    database: EngineDatabase,
    flows: Sequence[Flow],
    resources: Mapping[type, object],
    *,
    limit: int,
) -> AsyncIterator[Checked]:
    """Compare up to `limit` begun runs of these flows with their code, unfinished ones first."""
    known = {(flow.name, flow.version): flow for flow in flows}
    async with database.duty("check") as con:
        rows = await con.fetch(
            _SQL["runs_to_check"],
            [name for name, _ in known],
            [version for _, version in known],
            limit,
        )
    for first in range(0, len(rows), _BATCH):
        found = [(row, _claimed(row)) for row in rows[first : first + _BATCH]]
        histories = await history.load(database, [claimed.lease for _, claimed in found])
        for row, claimed in found:
            recorded = histories[claimed.lease]
            flow = known[claimed.flow, claimed.version]
            yield Checked(
                org_id=claimed.lease.org_id,
                run_id=claimed.lease.run_id,
                flow=flow.name,
                version=flow.version,
                state=row["state"],
                steps=len(recorded),
                comparison=await compare(flow, claimed, recorded, resources, row["error"]),
            )


def _is(error: Exception, failure: str | None) -> bool:
    """Whether a run failed by this error."""
    if failure is None:
        return False
    recorded, described = orjson.loads(failure), dump_error(error)
    return all(recorded.get(name) == described[name] for name in ("class", "code", "message"))


def _claimed(row: Record) -> Claimed:
    """Return a run as if it were claimed; nobody holds its lease."""
    run_id = row["run_id"]
    return Claimed(
        lease=Lease(row["org_id"], run_id, run_id, 0, uuid.UUID(int=0)),
        deaths=0,
        tries=0,
        cancel_requested=False,
        flow=row["flow"],
        version=row["version"],
        queue=row["queue"],
        input=row["input"],
        subject=row["subject"],
        timeout_s=None,
    )
