"""Once: steps whose effect must not be repeated, and the question when nobody knows whether it happened.

Called by `performing` around each try of such a step, and by `endgame` for steps that a cancel or a lost
worker left under way. Invariants: a marker is durable before the function runs; what ended in anything
but a result or `NotDone` is never tried again and never guessed, a human is asked instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine import questions
from millpond.engine.answers import outcome_form
from millpond.engine.branches import Branches
from millpond.engine.commit import StepWrite
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.leases import Lease, hold
from millpond.engine.manners import ASK_ROLE
from millpond.types import Json, new_id

_SQL = queries("once")
R = TypeVar("R")
# The states of a step between its marker and the knowledge of what became of it.
IN_DOUBT = frozenset({"begun", "unknown"})
INTERRUPTED: Json = {
    "class": "Interrupted",
    "code": "interrupted",
    "message": "the attempt ended while the step was under way",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """A begun step of which nobody knows whether it took effect; `error` is what is known of its end."""

    step_key: str
    name: str
    tries: int
    role: str = ASK_ROLE
    output: TypeAdapter[Any] | None = None
    error: Json = None


def marker(
    lease: Lease, *, step_key: str, name: str, tries: int, duration_s: float, seq: int | None
) -> StepWrite:
    """Return the record to commit before a try: from then on the step may have taken effect."""
    return StepWrite(
        lease=lease,
        step_key=step_key,
        name=name,
        state="begun",
        tries=tries,
        duration_s=duration_s,
        seq=seq,
        event_kind="step.started",
        event_data=orjson.dumps({"name": name, "tries": tries, "effect": "once"}).decode(),
    )


async def undisturbed(branches: Branches, work: Awaitable[R]) -> R:
    """Await the try to its end whatever time limit the flow has around it.

    Only the end of the attempt interrupts it; its own time limit is part of the try.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if branches.closed is not None:
                task.cancel()
    return task.result()


async def ask(database: EngineDatabase, lease: Lease, doubt: Doubt) -> None:
    """Record that the outcome is unknown and ask a human, once."""
    request_id = new_id()
    org_id, run_id, error = lease.org_id, lease.run_id, doubt.error or INTERRUPTED
    question = _question(lease, doubt, error)
    data = {"name": doubt.name, "tries": doubt.tries, "error": error}
    asked = {
        "name": doubt.name,
        "request_id": str(request_id),
        "role": doubt.role,
        "kind": "outcome",
    }
    async with database.duty("outcome") as con:
        await hold(con, lease)
        text = orjson.dumps(error).decode()
        if not await con.fetchval(_SQL["doubt"], org_id, run_id, doubt.step_key, request_id, text):
            return
        await questions.ask(
            con, org_id, run_id, doubt.step_key, request_id, question, kind="outcome"
        )
        facts = [
            Fact("step.unknown", doubt.step_key, data),
            Fact("input.requested", doubt.step_key, asked),
        ]
        await append(con, org_id, run_id, facts, duties=Duty.WAITS | Duty.ENDING)


def _question(lease: Lease, doubt: Doubt, error: Json) -> questions.Question:
    key = f"{lease.org_id}:{lease.run_id}:{doubt.step_key}"
    return questions.Question(
        name=doubt.name,
        role=doubt.role,
        title=f"Did {doubt.name} take effect? It was called with the idempotency key {key}",
        form=outcome_form(_schema(doubt.output)),
        proposal={
            "step": doubt.step_key,
            "name": doubt.name,
            "idempotency_key": key,
            "tries": doubt.tries,
            "error": error,
        },
        expires_in_s=None,
        expiry_answer=None,
    )


def _schema(output: TypeAdapter[Any] | None) -> Json:
    if output is None:
        return {}
    try:
        return output.json_schema()
    except PydanticInvalidForJsonSchema:
        return {}
