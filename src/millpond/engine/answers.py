"""Answers: what a human says about a `once` step whose outcome nobody knows.

Called by `waits` as a question of kind `outcome` is resolved. Invariant: only a step that is still in
doubt takes an answer, and takes it once; the caller holds the run's live row locked.
"""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import orjson

from millpond.db.pool import Connection, Record
from millpond.db.queries import queries
from millpond.engine.events import Fact
from millpond.errors import Conflict
from millpond.types import Json

_SQL = queries("once")


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


async def settle(
    con: Connection, org_id: int, request: Record, answer: Json, subject: str
) -> tuple[str, list[Fact]]:
    """Record an answer as the step's end, or let the step be tried again.

    Returns the step's name and what the answer means for it; `answer` fits the form.
    """
    run_id, step_key, outcome = request["run_id"], request["step_key"], answer["outcome"]
    state = {"done": "done", "not_done": "retrying", "fail": "failed"}[outcome]
    output = orjson.dumps(answer.get("output")).decode() if state == "done" else None
    error = {
        "class": "OutcomeDenied",
        "code": "outcome_denied",
        "message": f"{subject} decided that the step has failed",
    }
    text = orjson.dumps(error).decode() if state == "failed" else None
    row = await con.fetchrow(_SQL["settle"], org_id, run_id, step_key, state, output, text)
    if row is None:
        raise Conflict(f"step {step_key} is not in doubt any more", code="not_pending")
    data: dict[str, Json] = {"name": row["name"], "tries": row["tries"], "decided_by": subject}
    if state == "failed":
        return row["name"], [Fact("step.failed", step_key, {**data, "error": error})]
    kind = "step.succeeded" if state == "done" else "step.retrying"
    return row["name"], [Fact(kind, step_key, data)]
