"""The executor: one attempt of a run, as a straight line: resolve, perform, classify, record.

Called by the worker, one call per claimed run. Invariant: whatever happens inside the flow, exactly
one fenced write ends the attempt (finish, park, back off, release), or none if the lease is lost.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping

import orjson
import structlog

from millpond.engine import deadlines, endgame, waits
from millpond.engine.attempt import Attempt, Strand, insist, keep_spent, read_input
from millpond.engine.blocking import block
from millpond.engine.branches import Unwind
from millpond.engine.commit import FinishWrite
from millpond.engine.context import Context, Scope, StepFailed
from millpond.engine.continuing import hand_over
from millpond.engine.duties import Duty
from millpond.engine.encoding import dump, dump_error, readable
from millpond.engine.endgame import Failure
from millpond.engine.history import History
from millpond.engine.leases import Claimed
from millpond.engine.opening import draw_again
from millpond.engine.recording import Held
from millpond.engine.registry import Flow
from millpond.engine.resting import Rest
from millpond.engine.waits import Readied
from millpond.errors import LeaseLost, MillpondError, Permanent
from millpond.retry import Verdict, backoff_s, classify, retry_after_s

_log = structlog.get_logger("millpond.executor")
# Why a run goes to another worker, and what is told of it.
_HANDED_BACK = {"drained": "drain", "away": "away", "refused": "refused"}
# Ends whose write has no place for what was spent on models.
_NO_PLACE = frozenset({*_HANDED_BACK, "continued", "parked", "blocked"})


def prepare(
    claimed: Claimed, flows: Mapping[tuple[str, int], Flow], history: History, scope: Scope
) -> Attempt:
    """Resolve the code of a claimed run; the claim only hands out what this worker has."""
    flow = flows[claimed.flow, claimed.version]
    context = Context(claimed, history, scope, input_type=flow.input)
    return Attempt(claimed, flow, context, is_ending=endgame.is_ending(history))


async def execute(attempt: Attempt, scope: Scope) -> list[Readied]:
    """Execute one attempt to its end; returns runs that became ready by it.

    Never raises: what goes wrong is recorded on the run, or its lease is lost.
    """
    claimed, context = attempt.claimed, attempt.context
    began = time.monotonic()
    try:
        if claimed.cancel_requested and not (attempt.is_ending or context.is_obliged):
            return await _stopped(attempt, scope)  # nothing is executed: no secret is needed
        veils = claimed.duties and claimed.duties & Duty.SECRETS
        if veils and not await insist(lambda: draw_again(claimed, scope, claimed.duties)):
            return await _unwound(attempt, scope, "away", began)
        if claimed.cancel_requested or attempt.is_ending:
            return await _stopped(attempt, scope)
        try:
            output = await _perform(attempt, scope)
        except Unwind as unwind:
            return await _unwound(attempt, scope, unwind.reason, began)
        except Exception as error:
            return await _failed(attempt, scope, error)
        if attempt.slot is not None:
            attempt.slot.hand_over()
        held = context.take_held()
        end = FinishWrite(
            lease=claimed.lease,
            outcome="succeeded",
            output=output,
            event_data=f'{{"duration_s":{time.monotonic() - began:.6f}}}',
            spent=tuple(attempt.gather_spent()),
            last=None if held is None else held.write,
        )
        try:
            await scope.committer.finish(end)
        except LeaseLost:
            raise
        except MillpondError:
            if held is None:
                raise
            return await _one_by_one(attempt, scope, held, end, began)
    except LeaseLost:
        _log.info("run.lease_lost", run_id=str(claimed.lease.run_id), org_id=context.org_id)
    except MillpondError as error:
        return await _unstorable(attempt, scope, error)
    return []


async def _one_by_one(
    attempt: Attempt, scope: Scope, held: Held, end: FinishWrite, began: float
) -> list[Readied]:
    """Store the last step's result and the run's end apart, since the two were refused together."""
    try:
        await attempt.context.catch_up(held)
    except Unwind as unwind:
        return await _unwound(attempt, scope, unwind.reason, began)
    await scope.committer.finish(end._replace(last=None))
    return []


async def _perform(attempt: Attempt, scope: Scope) -> str:
    """Run the flow code; returns its output as JSON text."""
    context, flow = attempt.context, attempt.flow
    timer = None
    if (limit_s := attempt.claimed.timeout_s or flow.timeout_s) is not None:
        timer = asyncio.get_running_loop().call_later(limit_s, context.unwind, "timeout")

    try:
        with Strand(context):
            value = read_input(flow, attempt.claimed.input)
            if flow.on_failure is not None:
                await context.oblige()
            try:
                result = await flow.function(context, value)
            except Exception as error:
                if await _decide(attempt, scope, error, context.persist) is None:
                    await context.settle_children()
                raise
            await context.settle_children()
            output = dump(flow.output, result)
    except BaseException:
        if context.closed != "lost":
            await context.catch_up()
        raise
    finally:
        if timer is not None:
            timer.cancel()
    await context.catch_up(only_sent=True)
    if context.closed is not None:  # meanwhile
        raise Unwind(context.closed)
    return output


async def _unwound(attempt: Attempt, scope: Scope, reason: str, began: float) -> list[Readied]:
    """End an attempt whose flow code was ended from outside, or goes on as another run."""
    lease = attempt.claimed.lease
    if reason in _NO_PLACE:
        await keep_spent(attempt, scope)
    if reason == "continued":
        return await _continued(attempt, scope, began)
    if reason == "parked":
        keys = [key for key, _ in attempt.context.parked]
        is_human = all(human for _, human in attempt.context.parked)
        asks = attempt.context.asks
        rest = Rest(
            lease=lease,
            step_keys=keys,
            is_human=is_human,
            heeds_cancel=not attempt.is_ending,
            asks=asks,
            was_lined=bool(attempt.claimed.duties & Duty.LINES),
        )
        readied = await insist(lambda: scope.resting.rest(rest))
        if asks:
            scope.riding.stood()
        return [readied] if readied is not None else []
    if reason == "cancelled":
        return await _stopped(attempt, scope)
    if reason in _HANDED_BACK:
        # What is on its way to the database still counts; without the lease it would not.
        await attempt.context.settled()
        told = _HANDED_BACK[reason]
        return await insist(lambda: waits.release(scope.database, lease, reason=told))
    if reason == "timeout":
        limit = attempt.claimed.timeout_s or attempt.flow.timeout_s
        error = Permanent(f"the run took longer than {limit} s", code="timeout")
        return await _end(attempt, scope, Failure(outcome="failed", error=dump_error(error)))
    if reason == "unstorable" and (refused := attempt.context.unstorable) is not None:
        return await _unstorable(attempt, scope, refused)
    if reason == "blocked" and (mismatch := attempt.context.mismatch) is not None:
        _log.error("run.blocked", run_id=str(lease.run_id), mismatch=str(mismatch))
        await attempt.context.settled()
        heeds_cancel = not attempt.is_ending
        described = mismatch.described()
        return await insist(
            lambda: block(scope.database, lease, described, heeds_cancel=heeds_cancel)
        )
    return []


async def _continued(attempt: Attempt, scope: Scope, began: float) -> list[Readied]:
    continuation = attempt.context.continuation
    assert continuation is not None
    readied = await insist(
        lambda: hand_over(scope.database, attempt.claimed, continuation, time.monotonic() - began)
    )
    return await _stopped(attempt, scope) if readied is None else readied


async def _stopped(attempt: Attempt, scope: Scope) -> list[Readied]:
    """End a run that was asked to stop: cancelled by a person, or failed by its deadline."""
    error = await insist(lambda: deadlines.error_of(scope.database, attempt.claimed.lease))
    outcome = "cancelled" if error is None else "failed"
    return await _end(attempt, scope, Failure(outcome=outcome, error=error))


async def _failed(attempt: Attempt, scope: Scope, error: Exception) -> list[Readied]:
    """Retry the flow body for errors raised outside steps, else fail the run."""
    claimed = attempt.claimed
    described = dump_error(error)
    delay_s = await _decide(attempt, scope, error, insist)
    if isinstance(error, StepFailed):
        described["step"], described["cause"] = error.step, error.error_class
        described["code"] = readable(error.code)
    else:
        _log.warning(
            "flow.error",
            run_id=str(claimed.lease.run_id),
            flow=claimed.flow,
            error=type(error).__name__,
            exc_info=error,
        )
    if delay_s is None:
        return await _end(attempt, scope, Failure(outcome="failed", error=described))
    await keep_spent(attempt, scope)
    await insist(
        lambda: waits.back_off(
            scope.database,
            claimed.lease,
            delay_s=delay_s,
            error=described,
            tries=claimed.tries + 1,
            was_lined=bool(claimed.duties & Duty.LINES),
        )
    )
    return []


async def _decide(
    attempt: Attempt,
    scope: Scope,
    error: Exception,
    persist: Callable[[Callable[[], Awaitable[float]]], Awaitable[float]],
) -> float | None:
    """Decide, once for an error, after which time the flow body is tried again; None when it ends the run."""
    if attempt.decided is not None and attempt.decided[0] is error:
        return attempt.decided[1]
    delay_s, claimed = None, attempt.claimed
    verdict = classify(error)
    if not isinstance(error, StepFailed) and verdict is not Verdict.PERMANENT:
        elapsed_s = 0.0
        if claimed.tries:
            elapsed_s = await persist(lambda: waits.retrying_s(scope.database, claimed.lease))
        delay_s = backoff_s(
            attempt.flow.retry,
            tries=claimed.tries + 1,
            verdict=verdict,
            elapsed_s=elapsed_s,
            wish_s=retry_after_s(error),
            random=random.random,
        )
    attempt.decided = error, delay_s
    return delay_s


async def _end(attempt: Attempt, scope: Scope, failure: Failure) -> list[Readied]:
    """End a run that did not succeed, after what is to be done before that."""
    if attempt.is_ending or attempt.context.is_obliged:
        attempt.is_ending = True
        try:
            failure = await endgame.perform(attempt, scope, failure)
        except Unwind as unwind:
            return await _unwound(attempt, scope, unwind.reason, time.monotonic())
    error = failure.error
    await scope.committer.finish(
        FinishWrite(
            lease=attempt.claimed.lease,
            outcome=failure.outcome,
            error=None if error is None else orjson.dumps(error).decode(),
            event_data=orjson.dumps({} if error is None else {"error": error}).decode(),
            spent=tuple(attempt.gather_spent()),
        )
    )
    return []


async def _unstorable(attempt: Attempt, scope: Scope, error: MillpondError) -> list[Readied]:
    """Fail a run whose end the database refused to store as it was; if that fails too, block it."""
    if attempt.slot is not None:
        attempt.slot.take_again()
    _log.error("run.unstorable", run_id=str(attempt.claimed.lease.run_id), error=error.code)
    try:
        return await _end(attempt, scope, Failure(outcome="failed", error=dump_error(error)))
    except LeaseLost:
        _log.info("run.lease_lost", run_id=str(attempt.claimed.lease.run_id))
        return []
    except MillpondError as again:
        return await _stuck(attempt, scope, again)


async def _stuck(attempt: Attempt, scope: Scope, error: MillpondError) -> list[Readied]:
    """Let a run that cannot be ended stand still: another attempt would come to the same."""
    lease = attempt.claimed.lease
    _log.error("run.stuck", run_id=str(lease.run_id), error=error.code)
    try:
        await attempt.context.settled()
        await keep_spent(attempt, scope)
        return await insist(
            lambda: block(scope.database, lease, dump_error(error), heeds_cancel=False)
        )
    except LeaseLost:
        _log.info("run.lease_lost", run_id=str(lease.run_id))
        return []
