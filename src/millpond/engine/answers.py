"""Answers: what the step that asked a human gets to know.

Called by `waits` as a question is resolved. Invariant: only a step that still waits for its answer, or is
in doubt, takes one, and takes it once; the caller holds the run's live row locked.
"""

from __future__ import annotations

import uuid
from typing import Any

import jsonschema_rs
import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine import payloads
from millpond.engine.events import Fact
from millpond.engine.payloads import Payload
from millpond.errors import Conflict
from millpond.types import Json

_SQL = queries("once")
_WAITS = queries("waits")


def outcome_form(output_schema: Json) -> Json:
    """Return the JSON schema of the answer; `output` has to fit the schema of the step's result."""
    schema = dict(output_schema) if isinstance(output_schema, dict) else {}
    definitions = schema.pop("$defs", {})
    # A result that may be null may be left out.
    whole = jsonschema_rs.validator_for({**schema, "$defs": definitions}, offline=True)
    needed = [] if whole.is_valid(None) else ["output"]
    form: dict[str, Any] = {
        "type": "object",
        "title": "Outcome",
        "properties": {
            "outcome": {"enum": ["done", "not_done", "fail"], "title": "What happened"},
            "output": {"title": "The result, when it is done"},
        },
        "required": ["outcome"],
        "additionalProperties": False,
        "if": {"properties": {"outcome": {"const": "done"}}},
        "then": {"properties": {"output": schema}, "required": needed},
    }
    return {**form, "$defs": definitions} if definitions else form


async def record(
    con: Connection, org_id: int, request: Record, answer: Json, subject: str
) -> tuple[str, list[Fact]]:
    """Record an answer that fits the form; returns the step's name and what the answer means for it."""
    if request["kind"] == "outcome":
        return await _settle(con, org_id, request, answer, subject)
    run_id, step_key = request["run_id"], request["step_key"]
    output = {
        "answer": answer,
        "resolved_by": subject,
        "is_expired": False,
        "digest": request["digest"].hex(),
    }
    text = orjson.dumps(output).decode()
    name = await con.fetchval(
        _WAITS["end_wait"], org_id, run_id, step_key, "done", payloads.inline(text), None
    )
    await _keep(con, org_id, run_id, step_key, text)
    await con.execute(_WAITS["drop_timer"], org_id, run_id, step_key)
    return name, []


async def _settle(
    con: Connection, org_id: int, request: Record, answer: Json, subject: str
) -> tuple[str, list[Fact]]:
    """Record what became of a `once` step, or let it be tried again."""
    run_id, step_key, outcome = request["run_id"], request["step_key"], answer["outcome"]
    state = {"done": "done", "not_done": "retrying", "fail": "failed"}[outcome]
    output = orjson.dumps(answer.get("output")).decode() if state == "done" else None
    error = {
        "class": "OutcomeDenied",
        "code": "outcome_denied",
        "message": f"{subject} decided that the step has failed",
    }
    text = orjson.dumps(error).decode() if state == "failed" else None
    row = await con.fetchrow(
        _SQL["settle"], org_id, run_id, step_key, state, payloads.inline(output), text
    )
    if row is None:
        raise Conflict(f"step {step_key} is not in doubt any more", code="not_pending")
    await _keep(con, org_id, run_id, step_key, output)
    data: dict[str, Json] = {"name": row["name"], "tries": row["tries"], "decided_by": subject}
    if state == "failed":
        return row["name"], [Fact("step.failed", step_key, {**data, "error": error})]
    kind = "step.succeeded" if state == "done" else "step.retrying"
    return row["name"], [Fact(kind, step_key, data)]


async def _keep(
    con: Connection, org_id: int, run_id: uuid.UUID, step_key: str, text: str | None
) -> None:
    """Store what is too big for the step's own row beside it."""
    if text is not None and payloads.is_big(text):
        slot = payloads.slot_of_step(step_key)
        await payloads.keep(con, [Payload(org_id, run_id, slot, text)])
