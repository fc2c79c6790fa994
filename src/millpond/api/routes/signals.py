"""Signals: tell a run something.

Called by clients. Invariant: a 202 is sent only after the signal was committed; a repeat under the same
key sends nothing.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from millpond.api.accept import IdempotencyKey, digest_of, is_repeat, keep_promise, promised
from millpond.api.auth import Caller, requires
from millpond.api.batches import Promise
from millpond.api.bodies import described, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models_signals import SendSignal, SignalOut
from millpond.api.reply import reply
from millpond.engine import signals
from millpond.engine.signals import Sent
from millpond.errors import NotFound
from millpond.types import new_id

router = APIRouter(prefix="/v1/runs", tags=["runs"])

_ROUTE = "POST /v1/runs/{run_id}/signals"
_SIGNALS = uuid.UUID("5d0c3f0e-6a53-4d0b-9d38-6f3f0c3f7a11")
Signaller = Annotated[Caller, requires("runs:signal")]


@router.post(
    "/{run_id}/signals",
    operation_id="send_signal",
    status_code=202,
    openapi_extra=described(SendSignal),
    responses={
        202: {"model": SignalOut, "headers": ACCEPTED_HEADERS},
        **failures(400, 401, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def send_signal(
    request: Request, caller: Signaller, run_id: uuid.UUID, key: IdempotencyKey = None
) -> Response:
    """Tell a run something: it goes on if it waits for that, and finds it when it does later."""
    wish = await read_json(request, SendSignal)
    promise = promised(key, _ROUTE, lambda: digest_of([str(run_id), wish.model_dump()]))
    sent, is_replayed = await _send_once(caller, run_id, wish, promise)
    ports = caller.ports
    if sent.readied.queue:
        ports.hints.wake([sent.readied.queue])
    ports.hints.changed([run_id])
    headers = {"Location": f"/v1/runs/{run_id}", "Retry-After": "1"}
    if is_replayed:
        headers["Idempotency-Replayed"] = "true"
    return reply(_signal_json(sent), status=202, headers=headers)


class _TakenMeanwhile(Exception):
    """A rival committed the same key first."""


async def _send_once(
    caller: Caller, run_id: uuid.UUID, wish: SendSignal, promise: Promise | None
) -> tuple[Sent, bool]:
    """Send a signal, or find the one that was sent under this key; also tells which."""
    signal_id = _signal_id(caller, promise)
    try:
        async with caller.org() as con:
            if promise is not None:
                if await is_repeat(con, caller.principal, promise):
                    return await signals.sent(con, caller.org_id, run_id, signal_id), True
                if not await keep_promise(con, caller.principal, promise, run_id):
                    raise _TakenMeanwhile
            sent = await signals.send(
                con,
                caller.org_id,
                run_id,
                signal_id=signal_id,
                name=wish.name,
                data=wish.data,
                subject=caller.principal.subject,
            )
            return sent, False
    except _TakenMeanwhile:
        assert promise is not None
        async with caller.org() as con:
            if not await is_repeat(con, caller.principal, promise):
                raise NotFound(f"run {run_id} does not exist", param="run_id") from None
            return await signals.sent(con, caller.org_id, run_id, signal_id), True


def _signal_id(caller: Caller, promise: Promise | None) -> uuid.UUID:
    """Return a new id, or the one that a key stands for: a repeat finds its signal by it."""
    if promise is None:
        return new_id()
    return uuid.uuid5(_SIGNALS, f"{caller.org_id}\n{caller.principal.subject}\n{promise.key}")


def _signal_json(sent: Sent) -> dict[str, Any]:
    return {
        "id": sent.signal_id,
        "object": "signal",
        "run_id": sent.run_id,
        "name": sent.name,
        "sent_at": sent.sent_at,
    }
