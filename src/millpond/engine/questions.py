"""Questions to humans: asked by a run, answered once by whoever may decide, or expired.

Called by `context` and `once` (ask), by the API (resolve) and by `timers` (expire). Invariants: a decision holds for
exactly the proposal that it names, and is consumed once, under the lock of its run's live row.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

import jsonschema_rs
import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import answers
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.leases import Lease, hold
from millpond.engine.waits import Readied, wake_waiting
from millpond.errors import Conflict, Forbidden, InvalidInput, NotFound
from millpond.types import Json, Principal, new_id

_SQL = queries("waits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a human is asked: JSON schema of the answer, what is to be approved, who may decide.

    A form that is no JSON schema is refused as InvalidInput.
    """

    name: str
    role: str
    title: str
    form: Json
    proposal: Json
    expires_in_s: float | None
    expiry_answer: Json

    def __post_init__(self) -> None:
        try:
            jsonschema_rs.validator_for(self.form, offline=True)
        except ValueError as error:
            raise InvalidInput(
                f"the form of {self.name} is no JSON schema", param="form", code="bad_form"
            ) from error

    def digest(self) -> bytes:
        """Return SHA-256 over who decides and what is approved: a decision holds for exactly this."""
        parts = [self.role, self.proposal]
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).digest()


async def record_question(
    database: EngineDatabase,
    lease: Lease,
    *,
    step_key: str,
    question: Question,
    seq: int | None = None,
) -> None:
    """Store a question to a human, with the timer of its expiry."""
    request_id = new_id()
    org_id, run_id = lease.org_id, lease.run_id
    async with database.duty("ask") as con:
        await hold(con, lease)
        if not await con.fetchval(
            _SQL["record_wait"],
            org_id,
            run_id,
            step_key,
            question.name,
            "input",
            lease.attempt,
            seq,
        ):
            return
        await ask(con, org_id, run_id, step_key, request_id, question)
        if question.expires_in_s is not None:
            await con.fetchval(
                _SQL["set_timer"], org_id, run_id, step_key, "expiry", question.expires_in_s
            )
        data = {"name": question.name, "request_id": str(request_id), "role": question.role}
        fact = Fact("input.requested", step_key, data)
        await append(con, org_id, run_id, [fact], duties=Duty.WAITS)


async def ask(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    step_key: str,
    request_id: uuid.UUID,
    question: Question,
    *,
    kind: str = "question",
) -> None:
    """Store a question; `kind` is `question`, or `outcome` for one about a step with effect `once`."""
    await con.execute(
        _SQL["ask"],
        org_id,
        request_id,
        run_id,
        step_key,
        question.role,
        question.title,
        orjson.dumps(question.form).decode(),
        orjson.dumps(question.proposal).decode(),
        question.digest(),
        question.expires_in_s,
        None if question.expiry_answer is None else orjson.dumps(question.expiry_answer).decode(),
        kind,
    )


async def resolve(
    con: Connection,
    org_id: int,
    request_id: uuid.UUID,
    principal: Principal,
    answer: Json,
    digest: bytes | None = None,
) -> Readied:
    """Consume a question with a human's answer and ready its run; the caller commits, then hints.

    Raises NotFound, Forbidden (role), Conflict (decided, expired, or another proposal than the one
    of `digest`) and InvalidInput (the answer does not fit the form; `param` is its path).
    """
    request = await con.fetchrow(_SQL["get_request"], org_id, request_id)
    if request is None:
        raise NotFound(f"input request {request_id} does not exist", param="request_id")
    if not principal.roles & {request["role"], "owner", "admin"}:
        raise Forbidden(f"deciding this needs the role {request['role']}", param="role")
    await _four_eyes(con, org_id, request["run_id"], principal)
    if digest is not None and digest != request["digest"]:
        raise Conflict("what is to be approved is not what this decision names", param="digest")
    _fits(request["form"], answer)
    run_id, step_key = request["run_id"], request["step_key"]
    live = await con.fetchrow(_SQL["lock_run"], org_id, run_id)
    request = await con.fetchrow(_SQL["get_request"], org_id, request_id)
    assert request is not None
    if live is None or request["state"] != "pending" or request["is_expired"]:
        state = "expired" if request["is_expired"] else request["state"]
        state = "cancelled" if live is None and state == "pending" else state
        raise Conflict(f"input request {request_id} is {state}", code="not_pending")
    text = orjson.dumps(answer).decode()
    await con.fetchrow(
        _SQL["answer_request"], org_id, request_id, "resolved", text, principal.subject
    )
    name, facts = await answers.record(con, org_id, request, answer, principal.subject)
    data = {"name": name, "request_id": str(request_id), "resolved_by": principal.subject}
    facts = [Fact("input.resolved", step_key, data), *facts]
    return await wake_waiting(con, org_id, run_id, *facts)


async def _four_eyes(con: Connection, org_id: int, run_id: uuid.UUID, principal: Principal) -> None:
    """Raise Forbidden for a run that the principal, or who stands behind it, started, unless the org allows that.

    One without a standing is made on the machine itself, for itself alone: there is no second pair of eyes.
    """
    if principal.standing is None:
        return
    if await con.fetchval(_SQL["is_own_run"], org_id, run_id, principal.subject):
        raise Forbidden(
            f"run {run_id} was started by you, or by a program of yours: somebody else decides on it",
            code="own_run",
            advice="ask a colleague, or have the organization's policy changed",
        )


def _fits(form: str, answer: Json) -> None:
    validator = jsonschema_rs.validator_for(orjson.loads(form), mask="the value", offline=True)
    for error in validator.iter_errors(answer):
        path = ".".join(["answer", *(str(part) for part in error.instance_path)])
        raise InvalidInput(f"{path}: {error.message}", param=path, code="invalid_answer")


async def expire(con: Connection, org_id: int, run_id: uuid.UUID, step_key: str) -> None:
    """End the wait for a question that nobody answered in time; the caller holds the run's live row locked."""
    request_id = await con.fetchval(_SQL["request_of_step"], org_id, run_id, step_key)
    if request_id is None:
        return
    request = await con.fetchrow(_SQL["get_request"], org_id, request_id)
    assert request is not None
    await con.fetchrow(_SQL["answer_request"], org_id, request_id, "expired", None, None)
    output = error = None
    if request["expiry_answer"] is None:
        state = "failed"
        error = {
            "class": "InputExpired",
            "code": "input_expired",
            "message": "nobody decided in time",
        }
    else:
        state = "done"
        output = {
            "answer": orjson.loads(request["expiry_answer"]),
            "resolved_by": None,
            "is_expired": True,
            "digest": request["digest"].hex(),
        }
    name = await con.fetchval(
        _SQL["end_wait"],
        org_id,
        run_id,
        step_key,
        state,
        None if output is None else orjson.dumps(output).decode(),
        None if error is None else orjson.dumps(error).decode(),
    )
    data = {"name": name, "request_id": str(request_id)}
    await append(con, org_id, run_id, [Fact("input.expired", step_key, data)])
