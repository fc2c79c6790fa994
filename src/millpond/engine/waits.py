"""Waits: timers, questions to humans, parking and readying again.

Called by `context` and `executor` (record, park, release), by the API (resolve) and by maintenance
(fire). Invariants: the run's live row is locked first, then what it waits for; going to wait checks
every condition again under that lock, and whoever makes a condition true takes it too, so that no
wake-up is lost.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

import jsonschema_rs
import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import answers, parking
from millpond.engine.duties import Duty
from millpond.engine.events import Fact, append
from millpond.engine.lanes import ALONE, PRIORITY_STEP_US, RESUME_LEAD_US, SUSPECT_DEATHS
from millpond.engine.leases import Lease, hold
from millpond.engine.needs import Ask
from millpond.errors import Conflict, Forbidden, InvalidInput, NotFound
from millpond.types import Json, Principal, new_id

_SQL = queries("waits")
NOTHING: Mapping[str, Ask] = MappingProxyType({})


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Readied:
    """A run that may go on, and the queue to hint."""

    org_id: int
    run_id: uuid.UUID
    queue: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wake:
    """A locked live row to ready, with the event to store for it, if any."""

    org_id: int
    run_id: uuid.UUID
    event: Fact | None = None
    is_death: bool = False


async def ready(con: Connection, wakes: Sequence[Wake]) -> list[Readied]:
    """Queue runs again; the caller holds their live rows locked.

    Those already queued, and those that stand still blocked, are left and not returned.
    """
    if not wakes:
        return []
    rows = await con.fetch(
        _SQL["ready"],
        [wake.org_id for wake in wakes],
        [wake.run_id for wake in wakes],
        [wake.event.kind if wake.event else None for wake in wakes],
        [wake.event.encoded() if wake.event else None for wake in wakes],
        [int(wake.is_death) for wake in wakes],
        PRIORITY_STEP_US,
        RESUME_LEAD_US,
        SUSPECT_DEATHS,
        ALONE,
    )
    return [Readied(org_id=row[0], run_id=row[1], queue=row[2]) for row in rows]


async def record_sleep(
    database: EngineDatabase,
    lease: Lease,
    *,
    step_key: str,
    name: str,
    seconds: float,
    seq: int | None = None,
) -> None:
    """Store that the run sleeps from now on, with its timer."""
    async with database.duty("sleep") as con:
        await hold(con, lease)
        if not await con.fetchval(
            _SQL["record_wait"],
            lease.org_id,
            lease.run_id,
            step_key,
            name,
            "sleep",
            lease.attempt,
            seq,
        ):
            return
        due_at = await con.fetchval(
            _SQL["set_timer"], lease.org_id, lease.run_id, step_key, "sleep", seconds
        )
        fact = Fact("sleep.started", step_key, {"name": name, "until": due_at})
        await append(con, lease.org_id, lease.run_id, [fact], duties=Duty.WAITS)


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


async def oblige(database: EngineDatabase, lease: Lease, duty: Duty) -> None:
    """Set durably what the end of the run has to see to."""
    async with database.duty("oblige") as con:
        await hold(con, lease)
        await append(con, lease.org_id, lease.run_id, [], duties=duty)


async def record_backoff(
    database: EngineDatabase, lease: Lease, *, step_key: str, delay_s: float
) -> None:
    """Set the timer of a step's next try; the step itself is recorded as retrying before."""
    async with database.duty("backoff") as con:
        await hold(con, lease)
        await con.fetchval(
            _SQL["set_timer"], lease.org_id, lease.run_id, step_key, "retry", delay_s
        )
        await append(con, lease.org_id, lease.run_id, [], duties=Duty.WAITS)


async def release(database: EngineDatabase, lease: Lease, *, reason: str) -> list[Readied]:
    """Hand a run back to its queue, no try counted: another worker goes on with it."""
    async with database.duty("release") as con:
        await hold(con, lease)
        await con.execute(_SQL["unlease"], lease.org_id, lease.item_id, lease.token)
        fact = Fact("run.released", None, {"reason": reason})
        return await ready(con, [Wake(org_id=lease.org_id, run_id=lease.run_id, event=fact)])


async def back_off(
    database: EngineDatabase,
    lease: Lease,
    *,
    delay_s: float,
    error: Json,
    tries: int,
    was_lined: bool = False,
) -> None:
    """Let a run wait before its flow body is tried again; one that shall stop goes on at once.

    Steps of one that `was_lined` stand in line no more.
    """
    async with database.duty("retry") as con:
        if await hold(con, lease):
            delay_s = 0.0
        await con.execute(_SQL["unlease"], lease.org_id, lease.item_id, lease.token)
        if was_lined:
            await parking.stand(con, lease, [])
        await con.fetchval(_SQL["set_timer"], lease.org_id, lease.run_id, "", "retry", delay_s)
        data = orjson.dumps({"error": error, "tries": tries, "delay_s": round(delay_s, 3)}).decode()
        await con.execute(
            _SQL["rest"], lease.org_id, lease.run_id, "waiting", "run.retrying", data, 1
        )


async def now(database: EngineDatabase) -> datetime:
    """Return the database's time in UTC."""
    async with database.statement("now") as con:
        at: datetime = await con.fetchval(_SQL["now"])
    return at.astimezone(UTC)


async def retrying_s(database: EngineDatabase, lease: Lease) -> float:
    """Return for how many seconds a run's flow body has been tried again, by the database's clock."""
    async with database.statement("retrying") as con:
        seconds: float | None = await con.fetchval(_SQL["retrying_s"], lease.org_id, lease.run_id)
    return seconds or 0.0


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


async def wake_waiting(con: Connection, org_id: int, run_id: uuid.UUID, *facts: Fact) -> Readied:
    """Store the facts; ready the run if it waits. A running one finds the answer as it parks."""
    await append(con, org_id, run_id, facts)
    row = await con.fetchrow(_SQL["lock_run"], org_id, run_id)
    if row is not None and row["state"] in ("waiting", "awaiting_input"):
        for readied in await ready(con, [Wake(org_id=org_id, run_id=run_id)]):
            return readied
    return Readied(org_id=org_id, run_id=run_id, queue="")


def _fits(form: str, answer: Json) -> None:
    validator = jsonschema_rs.validator_for(orjson.loads(form), mask="the value", offline=True)
    for error in validator.iter_errors(answer):
        path = ".".join(["answer", *(str(part) for part in error.instance_path)])
        raise InvalidInput(f"{path}: {error.message}", param=path, code="invalid_answer")


async def fire(database: EngineDatabase, *, limit: int = 500) -> list[Readied]:
    """Let due timers take effect; returns the runs that may go on."""
    async with database.statement("due") as con:
        due = await con.fetch(_SQL["due"], limit)
    if not due:
        return []
    async with database.duty("timers") as con:
        runs = sorted({(row["org_id"], row["run_id"]) for row in due})
        locked = {
            (row["org_id"], row["run_id"]): row["state"]
            for row in await con.fetch(
                _SQL["lock_items"], [org for org, _ in runs], [run for _, run in runs]
            )
        }
        mine = [row for row in due if (row["org_id"], row["run_id"]) in locked]
        if len(mine) < len(due):
            await con.execute(
                _SQL["sweep_timers"],
                [row["org_id"] for row in due],
                [row["run_id"] for row in due],
                [row["step_key"] for row in due],
            )
        taken = await con.fetch(
            _SQL["take_timers"],
            [row["org_id"] for row in mine],
            [row["run_id"] for row in mine],
            [row["step_key"] for row in mine],
        )
        sleeps = [row for row in taken if row["kind"] == "sleep"]
        if sleeps:
            await con.execute(
                _SQL["end_sleeps"],
                [row["org_id"] for row in sleeps],
                [row["run_id"] for row in sleeps],
                [row["step_key"] for row in sleeps],
            )
        signals = [row for row in taken if row["kind"] == "signal"]
        if signals:
            await con.execute(
                _SQL["end_signal_waits"],
                [row["org_id"] for row in signals],
                [row["run_id"] for row in signals],
                [row["step_key"] for row in signals],
            )
        for row in taken:
            if row["kind"] == "expiry":
                await _expire(con, row["org_id"], row["run_id"], row["step_key"])
        starts = {(row["org_id"], row["run_id"]) for row in taken if row["kind"] == "start"}
        woken = {(row["org_id"], row["run_id"]) for row in taken}
        return await ready(
            con,
            [
                Wake(
                    org_id=org_id,
                    run_id=run_id,
                    event=Fact("run.queued") if (org_id, run_id) in starts else None,
                )
                for org_id, run_id in sorted(woken)
                if locked[org_id, run_id] != "running"
            ],
        )


async def _expire(con: Connection, org_id: int, run_id: uuid.UUID, step_key: str) -> None:
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
