"""The endgame: what a run does before it ends as failed or cancelled.

Called by `executor` for runs with the duty ENDING. Invariants: how the run ends is recorded first and
nothing changes it after that; a `once` step in doubt is asked about before anything is undone; undos are
performed one by one in reverse order of the steps' completion, then `on_failure`, all as durable steps
that a cancel does not end; after a crash the next attempt goes on with what is not recorded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
import structlog

from millpond.engine import history, once
from millpond.engine.attempt import Attempt, Strand, insist, read_input
from millpond.engine.branches import Unwind
from millpond.engine.commit import StepWrite
from millpond.engine.context import Context
from millpond.engine.encoding import dump_error
from millpond.engine.history import History
from millpond.engine.opening import reopened
from millpond.engine.recording import is_away
from millpond.engine.replaying import Findings, Rehearsal, Undo
from millpond.engine.scope import Scope
from millpond.errors import LeaseLost
from millpond.types import Json

KEY = "!ending"
# Under it stands, by ending, that it failed and that this was told.
_TOLD = "!ending/"
# The branches of endings: names of steps hold no `!`, so that no flow's own branch is called so.
UNDO, FAILURE = "!undo/", "!failure/"
_log = structlog.get_logger("millpond.endgame")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """How a run is about to end: `outcome` is failed or cancelled, `error` is None for a cancel."""

    outcome: str
    error: Json = None

    def text(self) -> str:
        """Return this as JSON text."""
        return orjson.dumps({"outcome": self.outcome, "error": self.error}).decode()


async def perform(attempt: Attempt, scope: Scope, failure: Failure) -> Failure:
    """Do what is to be done before the run ends; returns how it ends, as recorded first.

    What the attempt had spent on models is stored with that record. Raises Unwind when the endings have to wait or
    were ended from outside: `attempt.context` tells.
    """
    recorded = await _load(attempt, scope)
    failure = await _decide(attempt, scope, recorded, failure)
    findings = await _rehearse(attempt, scope, recorded)
    await _await_outcomes(attempt, scope, recorded, findings)
    attempt.enter(Context(attempt.claimed, recorded, scope, heeds_cancel=False))
    undos = _in_order(findings, recorded)
    with Strand(attempt.context):
        await _compensate(attempt, scope, failure, undos, recorded)
    return failure


def is_ending(recorded: History) -> bool:
    """Whether how the run ends has been recorded."""
    return KEY in recorded


async def _load(attempt: Attempt, scope: Scope) -> History:
    """Read what is recorded now: this attempt has recorded more than it was given."""
    await attempt.context.settled()
    lease = attempt.claimed.lease
    return (await insist(lambda: history.load(scope.database, [lease])))[lease]


async def _decide(attempt: Attempt, scope: Scope, recorded: History, failure: Failure) -> Failure:
    """Record how the run ends, or return how it was recorded that it does."""
    known = recorded.get(KEY)
    if known is not None:
        return Failure(**orjson.loads(known.output or "{}"))
    spent = attempt.gather_spent()
    write = StepWrite(
        lease=attempt.claimed.lease,
        step_key=KEY,
        name="ending",
        kind="ending",
        state="done",
        output=failure.text(),
        event_kind="run.ending",
        event_data=failure.text(),
        spent=tuple(spent),
    )
    await scope.committer.record(write)
    spent.clear()
    return failure


async def _rehearse(attempt: Attempt, scope: Scope, recorded: History) -> Findings:
    """Replay the flow to find its undos and doubts; Unwind when its code does not match."""
    try:
        reopening = await insist(lambda: reopened(attempt.claimed, scope, recorded))
    except LeaseLost as error:
        if is_away(error.__cause__):
            raise Unwind("away") from error
        raise
    rehearsal = Rehearsal(
        attempt.flow,
        attempt.claimed,
        recorded,
        scope,
        only_results=True,
        heeds_cancel=False,
        opens=reopening.open,
    )
    if not rehearsal.findings.unmet:
        return rehearsal.findings
    attempt.enter(rehearsal.context)
    replayed = await rehearsal.replay()
    if replayed.outcome == "ended" and replayed.reason != "timeout":
        raise Unwind(replayed.reason)
    if rehearsal.mismatch is not None:
        attempt.context.mismatch = rehearsal.mismatch
        raise Unwind("blocked")
    return rehearsal.findings


async def _await_outcomes(
    attempt: Attempt, scope: Scope, recorded: History, findings: Findings
) -> None:
    """Ask about `once` steps in doubt; Unwind until every answer is there."""
    lease = attempt.claimed.lease
    doubtful = {
        key: one
        for key, one in recorded.items()
        if one.state in once.IN_DOUBT and not key.startswith("!")
    }
    for key, one in doubtful.items():
        doubt = findings.doubts.get(key) or once.Doubt(step_key=key, name=one.name, tries=one.tries)
        if one.state == "begun":
            await insist(partial(once.ask, scope.database, lease, doubt))
    for key in doubtful:
        context = Context(attempt.claimed, recorded, scope, heeds_cancel=False)
        attempt.enter(context)
        with Strand(context):
            await context.await_answer(key)


def _in_order(findings: Findings, recorded: History) -> list[Undo]:
    """Return the undos, those of the steps that completed last first."""

    def completed(undo: Undo) -> tuple[float, str]:
        at = recorded[undo.key].finished_at
        return (at.timestamp() if at is not None else 0.0), undo.key

    return sorted(findings.undos.values(), key=completed, reverse=True)


async def _compensate(
    attempt: Attempt, scope: Scope, failure: Failure, undos: Sequence[Undo], recorded: History
) -> None:
    """Perform undos and `on_failure`; what fails for good is recorded, and the rest still runs."""
    context, flow = attempt.context, attempt.flow
    for undo in undos:
        context.move(f"{UNDO}{undo.key}/")
        if (error := await _error_of(context, context.step(undo.step, undo.value))) is not None:
            await _tell(attempt, scope, f"{_TOLD}{undo.key}", error, recorded)
    if flow.on_failure is not None:
        context.move(FAILURE)
        if (error := await _error_of(context, _after_failure(attempt, failure))) is not None:
            await _tell(attempt, scope, f"{_TOLD}{FAILURE}", error, recorded)


async def _after_failure(attempt: Attempt, failure: Failure) -> None:
    """Await `on_failure`; a recorded input that the flow no longer takes is an error of it."""
    assert attempt.flow.on_failure is not None
    value = read_input(attempt.flow, attempt.claimed.input)
    await attempt.flow.on_failure(attempt.context, value, failure)


async def _error_of(context: Context, ending: Awaitable[Any]) -> Exception | None:
    """Await one ending; returns its error, since the others still run."""
    try:
        await ending
    except Exception as error:
        if context.closed is not None:
            raise
        return error
    return None


async def _tell(
    attempt: Attempt, scope: Scope, key: str, error: Exception, recorded: History
) -> None:
    """Tell by an event, once, that an ending failed; a later attempt meets the same error again."""
    lease = attempt.claimed.lease
    _log.error("ending.failed", run_id=str(lease.run_id), exc_info=error)
    if key in recorded:
        return
    write = StepWrite(
        lease=lease,
        step_key=key,
        name="ending",
        kind="ending",
        state="done",
        output="null",
        event_kind="run.ending_failed",
        event_data=orjson.dumps({"error": dump_error(error)}).decode(),
    )
    await scope.committer.record(write)
