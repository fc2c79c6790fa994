"""The executor: one attempt of a run, as a straight line: resolve, perform, classify, record.

Called by the worker, one call per claimed run. Invariant: whatever happens inside the flow, exactly
one fenced write ends the attempt (finish, park, back off, release), or none if the lease is lost.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import orjson
import structlog
from pydantic import ValidationError

from millpond.engine import waits
from millpond.engine.branches import Unwind
from millpond.engine.claim import Claimed
from millpond.engine.commit import FinishWrite
from millpond.engine.context import Context, Scope, StepFailed
from millpond.engine.encoding import dump, dump_error
from millpond.engine.history import History
from millpond.engine.registry import Flow
from millpond.engine.waits import Readied
from millpond.errors import InvalidInput, LeaseLost, MillpondError, Permanent, Transient
from millpond.retry import backoff_s, classify, retry_after_s
from millpond.types import Json

R = TypeVar("R")
_log = structlog.get_logger("millpond.executor")


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A claimed run with its code and history, ready to be executed."""

    claimed: Claimed
    flow: Flow
    context: Context

    @property
    def capability(self) -> str:
        """What its worker must have for it."""
        return self.flow.capability

    @property
    def deadline(self) -> float | None:
        """When the first of its running steps is over its time, on the loop's clock."""
        return self.context.deadline

    def unwind(self, reason: str) -> None:
        """End its flow code from outside."""
        self.context.unwind(reason)


def prepare(
    claimed: Claimed, flows: Mapping[tuple[str, int], Flow], history: History, scope: Scope
) -> Attempt:
    """Resolve the code of a claimed run; the claim only hands out what this worker has."""
    flow = flows[claimed.flow, claimed.version]
    return Attempt(claimed, flow, Context(claimed, history, scope))


async def execute(attempt: Attempt, scope: Scope) -> list[Readied]:
    """Execute one attempt to its end; returns runs that became ready by it.

    Never raises: what goes wrong is recorded on the run, or its lease is lost.
    """
    claimed, context = attempt.claimed, attempt.context
    began = time.monotonic()
    try:
        if claimed.cancel_requested:
            return await _cancelled(attempt, scope)
        try:
            output = await _perform(attempt)
        except Unwind as unwind:
            return await _unwound(attempt, scope, unwind.reason)
        except Exception as error:
            return await _failed(attempt, scope, error)
        data = f'{{"duration_s":{time.monotonic() - began:.6f}}}'
        await scope.committer.finish(
            FinishWrite(lease=claimed.lease, outcome="succeeded", output=output, event_data=data)
        )
    except LeaseLost:
        _log.info("run.lease_lost", run_id=str(claimed.lease.run_id), org_id=context.org_id)
    except MillpondError as error:
        await _unstorable(attempt, scope, error)
    return []


async def _perform(attempt: Attempt) -> str:
    """Run the flow code; returns its output as JSON text."""
    context, flow = attempt.context, attempt.flow
    task = asyncio.current_task()
    assert task is not None
    context.begin()
    timer = None
    if (limit_s := attempt.claimed.timeout_s or flow.timeout_s) is not None:
        timer = asyncio.get_running_loop().call_later(limit_s, context.unwind, "timeout")
    try:
        try:
            value = flow.input.validate_json(attempt.claimed.input or "null")
        except ValidationError as error:
            raise InvalidInput(
                f"the input does not fit: {_places(error)}", param="input"
            ) from error
        result = await flow.function(context, value)
        if context.closed is not None:
            raise Unwind(context.closed)
        return dump(flow.output, result)
    except BaseException as error:
        # Also groups that hold an Unwind, as task groups make them: why it ended decides.
        if context.closed is not None:
            raise Unwind(context.closed) from error
        if isinstance(error, Exception) or task.cancelling():
            raise
        raise Transient(
            f"the flow was ended by a {type(error).__name__} that nobody had asked for",
            code="stray_exit",
        ) from error
    finally:
        if timer is not None:
            timer.cancel()
        context.end()
        while task.cancelling():
            task.uncancel()


def _places(error: ValidationError) -> str:
    return dump_error(error)["message"]  # type: ignore[no-any-return]


async def _unwound(attempt: Attempt, scope: Scope, reason: str) -> list[Readied]:
    """End an attempt whose flow code was ended from outside."""
    lease = attempt.claimed.lease
    if reason == "parked":
        keys = [key for key, _ in attempt.context.parked]
        is_human = all(human for _, human in attempt.context.parked)
        readied = await _persist(
            lambda: waits.park(scope.database, lease, step_keys=keys, is_human=is_human)
        )
        return [readied] if readied is not None else []
    if reason == "cancelled":
        return await _cancelled(attempt, scope)
    if reason == "drained":
        return await _persist(lambda: waits.release(scope.database, lease, reason="drain"))
    if reason == "timeout":
        limit = attempt.claimed.timeout_s or attempt.flow.timeout_s
        error = Permanent(f"the run took longer than {limit} s", code="timeout")
        await _end(attempt, scope, "failed", dump_error(error))
    return []


async def _cancelled(attempt: Attempt, scope: Scope) -> list[Readied]:
    await _end(attempt, scope, "cancelled", None)
    return []


async def _failed(attempt: Attempt, scope: Scope, error: Exception) -> list[Readied]:
    """Retry the flow body for errors raised outside steps, else fail the run."""
    claimed = attempt.claimed
    described = dump_error(error)
    delay_s = None
    if isinstance(error, StepFailed):
        described["step"], described["cause"] = error.step, error.error_class
        described["code"], described["message"] = error.code, str(error)
    else:
        delay_s = backoff_s(
            attempt.flow.retry,
            tries=claimed.tries + 1,
            verdict=classify(error),
            elapsed_s=0.0,
            wish_s=retry_after_s(error),
            random=random.random,
        )
        _log.warning(
            "flow.error",
            run_id=str(claimed.lease.run_id),
            flow=claimed.flow,
            error=type(error).__name__,
            exc_info=error,
        )
    if delay_s is None:
        await _end(attempt, scope, "failed", described)
    else:
        await _persist(
            lambda: waits.back_off(
                scope.database,
                claimed.lease,
                delay_s=delay_s,
                error=described,
                tries=claimed.tries + 1,
            )
        )
    return []


async def _end(attempt: Attempt, scope: Scope, outcome: str, error: Json) -> None:
    await scope.committer.finish(
        FinishWrite(
            lease=attempt.claimed.lease,
            outcome=outcome,
            error=None if error is None else orjson.dumps(error).decode(),
            event_data=orjson.dumps({} if error is None else {"error": error}).decode(),
        )
    )


async def _unstorable(attempt: Attempt, scope: Scope, error: MillpondError) -> None:
    """Fail a run whose end the database refused to store as it was."""
    _log.error("run.unstorable", run_id=str(attempt.claimed.lease.run_id), error=error.code)
    try:
        await _end(attempt, scope, "failed", dump_error(error))
    except MillpondError as again:
        # The lease stays until this worker ends; rescue then gives the run to another.
        _log.error("run.stuck", run_id=str(attempt.claimed.lease.run_id), error=again.code)


async def _persist(write: Callable[[], Awaitable[R]]) -> R:
    """Make the write that ends an attempt, again while the database is out of reach."""
    for _ in range(100):
        try:
            return await write()
        except Transient:
            await asyncio.sleep(0.3)
    raise LeaseLost("the database stayed out of reach")
