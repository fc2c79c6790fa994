"""The step executor: one attempt of a step of a run elsewhere: resolve, perform, classify, record.

Called by the worker, one call per claimed step. Invariants: the run's flow is not replayed; exactly one
fenced write ends the attempt (settle, rest, release, drop, block), or none if the lease is lost.
"""

from __future__ import annotations

import structlog

from millpond.engine import metering, refusals, remote
from millpond.engine.branches import Unwind
from millpond.engine.opening import draw_again
from millpond.engine.scope import Scope
from millpond.engine.step_attempt import StepAttempt
from millpond.engine.step_tries import StepTries, insist
from millpond.engine.waits import Readied
from millpond.errors import LeaseLost, MillpondError

_log = structlog.get_logger("millpond.step_executor")


async def execute_step(attempt: StepAttempt, scope: Scope) -> list[Readied]:
    """Execute one attempt of a step to its end; returns what became ready by it.

    Never raises: what goes wrong is recorded on the step, or its lease is lost.
    """
    lease = attempt.claimed.lease
    try:
        if attempt.order is None or attempt.claimed.cancel_requested:
            await insist(lambda: remote.drop(scope.database, lease))
            return []
        order = attempt.order
        if not await insist(lambda: draw_again(attempt.claimed, scope, order.duties)):
            return await _unwound(attempt, scope, "away")
        try:
            await StepTries(attempt, scope, order).run()
        except Unwind as unwind:
            attempt.end()
            return await _unwound(attempt, scope, unwind.reason)
    except LeaseLost:
        _log.info("step.lease_lost", run_id=str(lease.run_id), org_id=lease.org_id)
    except MillpondError as error:
        return await _refused(attempt, scope, error)
    return []


async def _refused(attempt: StepAttempt, scope: Scope, error: MillpondError) -> list[Readied]:
    """End an attempt whose outcome the database did not store; nothing ends that from outside any more."""
    lease, order = attempt.claimed.lease, attempt.order
    attempt.end()
    try:
        await refusals.fail(
            attempt.claimed,
            order.name if order else "",
            scope,
            error,
            tries=attempt.tries,
            spent=attempt.spent,
        )
    except LeaseLost:
        _log.info("step.lease_lost", run_id=str(lease.run_id), org_id=lease.org_id)
    except MillpondError as again:
        # Not even that: the watch hands the lease back, and the step is tried again.
        _log.error("step.unblockable", run_id=str(lease.run_id), error=again.code)
    return []


async def _unwound(attempt: StepAttempt, scope: Scope, reason: str) -> list[Readied]:
    """End an attempt whose function was ended from outside."""
    lease = attempt.claimed.lease
    if attempt.spent and reason in ("cancelled", "drained", "away"):
        await insist(lambda: metering.keep(scope.database, lease, attempt.spent))
    if reason == "cancelled":
        await insist(lambda: remote.drop(scope.database, lease))
    elif reason in ("drained", "away"):
        told = "drain" if reason == "drained" else reason
        return await insist(lambda: remote.release(scope.database, lease, reason=told))
    return []
