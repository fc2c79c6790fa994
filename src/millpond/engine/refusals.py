"""Refusals: what becomes of a step from another queue whose outcome the database does not store.

Called by `step_executor`. Invariant: it is not executed again for that: it fails by the refusal, or stands still until
a person resumes its run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import orjson
import structlog

from millpond.engine import blocking, metering
from millpond.engine.attempt import insist
from millpond.engine.encoding import dump, dump_error
from millpond.engine.events import Fact
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.remote import RemoteWrite
from millpond.engine.scope import Scope
from millpond.errors import LeaseLost, MillpondError
from millpond.types import Json

_log = structlog.get_logger("millpond.step_executor")


async def fail(
    claimed: Claimed,
    name: str,
    scope: Scope,
    error: MillpondError,
    *,
    tries: int,
    spent: Sequence[Spent],
) -> None:
    """Fail a step, tried so often, by the error with which its outcome was refused; if that is refused too, block it.

    `spent` is what its tries used and no record told of. Raises LeaseLost.
    """
    _log.error("step.unstorable", run_id=str(claimed.lease.run_id), error=error.code)
    key = claimed.step_key or ""
    described = dump_error(error, name)
    data: dict[str, Json] = {"name": name, "tries": tries, "queue": claimed.queue}
    write = RemoteWrite(
        lease=claimed.lease,
        step_key=key,
        event_kind="step.failed",
        event_data=dump(None, {**data, "error": described}),
        state="failed",
        error=orjson.dumps(described).decode(),
        tries=tries,
        spent=tuple(spent),
    )
    try:
        await scope.settler.record(write)
    except LeaseLost:
        raise
    except MillpondError as again:
        if spent:
            with contextlib.suppress(MillpondError):
                await metering.keep(scope.database, claimed.lease, spent)
        await _block(claimed, scope, again, Fact("step.blocked", key, data))


async def _block(claimed: Claimed, scope: Scope, error: MillpondError, told: Fact) -> None:
    """Let a step that cannot be ended stand still: another attempt would come to the same."""
    run_id = claimed.lease.run_id
    _log.error("step.stuck", run_id=str(run_id), error=error.code)
    reason = dump_error(error)
    await insist(lambda: blocking.block_step(scope.database, claimed.lease, reason, told))
    scope.hints.changed([run_id])
