"""Child runs: `ctx.start` and `ctx.join`.

A part of `Context`. Invariants: a child is submitted in the transaction that records the step which
starts it, so that neither a replay nor a commit of unknown outcome starts two; a join looks for the
child's end under the lock that this end takes too, so that it is never missed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import endings
from millpond.engine.checkpoints import Checkpoints
from millpond.engine.duties import NO_DUTY, Duty
from millpond.engine.encoding import dump, dump_error, load, veiled
from millpond.engine.events import Fact, append
from millpond.engine.fanning import fan
from millpond.engine.fitting import check_fits
from millpond.engine.history import Recorded, just
from millpond.engine.keying import check_keys
from millpond.engine.leases import Lease, hold
from millpond.engine.plans import StepFailed, failure
from millpond.engine.registry import Flow
from millpond.engine.rights import ENDINGS, backing_of
from millpond.engine.submit import deadline_of, submit
from millpond.errors import InvalidInput, NotFound, Permanent
from millpond.types import (
    INTERACTIVE,
    STANDARD,
    Backing,
    ClosePolicy,
    Intent,
    Json,
    Parent,
    Urgency,
    lesser,
    new_id,
)

_SQL = queries("children")
# A flow that starts itself by mistake ends here.
MAX_GENERATIONS = 32


class ChildFailed(StepFailed):
    """A child run failed or was cancelled: `outcome` says which, `error` what its run says."""

    def __init__(self, step: str, described: Mapping[str, Json]) -> None:
        super().__init__(
            step,
            error_class="ChildFailed",
            code=str(described.get("code", "")),
            message=str(described.get("message", "")),
        )
        self.run_id = uuid.UUID(str(described["run_id"]))
        self.outcome = str(described.get("outcome", ""))
        self.error = described.get("error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A child run, to be joined; `close` is what the end of its parent means for it."""

    run_id: uuid.UUID
    flow: str
    name: str
    step_key: str
    close: ClosePolicy
    output: TypeAdapter[Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    """A child as its flow asks for it; what is None is taken over or looked up."""

    flow: str
    version: int | None
    queue: str | None
    timeout_s: float | None
    input: bytes
    priority: int | None
    urgency: Urgency
    labels: Mapping[str, str] | None
    keys: Sequence[str]
    delay_s: float
    deadline_s: float | None
    close: ClosePolicy
    is_by_name: bool


class Children(Checkpoints):
    """The calls that start and join child runs."""

    _unjoined: dict[str, Child]

    async def start(
        self,
        flow: Flow | str,
        input: Any = None,
        *,
        name: str | None = None,
        version: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        urgency: Urgency = INTERACTIVE,
        labels: Mapping[str, str] | None = None,
        keys: Sequence[str] = (),
        tokens: int | None = None,
        delay_s: float = 0.0,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        close: ClosePolicy = "cancel",
        output: Any = None,
    ) -> Child:
        """Start a run of a flow, or of the flow published under a name, as a child of this run.

        It has this run's org, subject, labels and priority where others are not given, and is interactive where its
        flow and this run are, unless `urgency` says standard. `close`: when this
        run ends, the child is cancelled, is left alone (`abandon`), or this run's end waits for it
        (`wait`). `output` is the type of its result where the flow is named by text.
        """
        wish = _Wish(
            flow=flow if isinstance(flow, str) else flow.name,
            version=version if isinstance(flow, str) else flow.version,
            queue=queue if isinstance(flow, str) or queue else flow.queue,
            timeout_s=timeout_s if isinstance(flow, str) or timeout_s else flow.timeout_s,
            is_by_name=isinstance(flow, str),
            input=encode_input(None if isinstance(flow, str) else flow.input, input),
            priority=priority,
            urgency=urgency if isinstance(flow, str) else lesser(urgency, flow.urgency),
            labels=None if labels is None else orjson.loads(dump(None, labels)),
            keys=check_keys(
                [veiled(one) for one in keys],
                declared=() if isinstance(flow, str) else flow.keys,
                tokens=tokens,
            ),
            delay_s=delay_s,
            deadline_s=deadline_of(
                None if isinstance(flow, str) else flow.deadline_s,
                given_s=deadline_s,
                delay_s=delay_s,
            ),
            close=close,
        )
        key = self._branches.here().key(name or wish.flow)
        recorded = self._lookup(key, "child")
        if recorded is not None and recorded.state == "failed":
            raise failure(name or wish.flow, orjson.loads(recorded.error or "{}"))
        if recorded is None:
            await self._permit(key, name or wish.flow)
            place = self._branches.place(key)
            run_id, woken = await self._performer.persist(
                lambda: _record_child(
                    self._scope.database, self._lease, key, place, name or wish.flow, wish
                )
            )
            self._scope.hints.wake([woken] if woken else [])
        else:
            run_id = uuid.UUID(orjson.loads(recorded.output or "{}")["run_id"])
        adapter = flow.output if isinstance(flow, Flow) else None
        child = Child(
            run_id=run_id,
            flow=wish.flow,
            name=name or wish.flow,
            step_key=key,
            close=close,
            output=adapter if output is None else TypeAdapter(output),
        )
        if close == "wait":
            self._unjoined[key] = child
        return child

    async def _permit(self, key: str, name: str) -> None:
        """Record a refusal and raise it where the run may not start a child for its subject any more."""
        refused = await self._performer.refusal(key, name)
        if refused is None:
            return
        described = dump_error(refused, name)
        text = orjson.dumps(described).decode()
        data = {"name": name, "tries": 1, "error": described}
        await self._performer.record(
            key, name, "step.failed", data, kind="child", state="failed", error=text
        )
        raise failure(name, described) from refused

    async def join(self, child: Child) -> Any:
        """Wait, holding nothing, for a child's end and return its output; raises ChildFailed.

        A child that continues as another run is followed to the last one.
        """
        key = self._branches.here().key(f"join {child.name}")
        recorded = await self._end_of(child, key)
        self._unjoined.pop(child.step_key, None)
        if recorded.state == "failed":
            raise ChildFailed(child.name, orjson.loads(recorded.error or "{}"))
        return load(child.output, recorded.output)

    async def run_flow(self, flow: Flow | str, input: Any = None, **options: Any) -> Any:
        """Start a child and join it; takes what `start` takes."""
        return await self.join(await self.start(flow, input, **options))

    async def settle_children(self) -> None:
        """Wait for the children whose end this run's end waits for, however they end."""
        if not self._unjoined:
            return
        left = [self._unjoined[key] for key in sorted(self._unjoined)]
        # Under keys of their own, so that they are the same wherever the flow ends.
        waits_for = [partial(self._end_of, child, f"!join {child.step_key}") for child in left]
        await fan(self._branches, waits_for)
        self._unjoined.clear()

    async def _end_of(self, child: Child, key: str) -> Recorded:
        place = self._branches.place(key)
        return await self._outcome_of(
            key,
            "join",
            lambda: _record_join(self._scope.database, self._lease, key, place, child),
        )


def encode_input(adapter: TypeAdapter[Any] | None, value: Any) -> bytes:
    """Return an input as JSON; raises InvalidInput when it does not fit the flow's type."""
    if adapter is None:
        return dump(None, value).encode()
    try:
        return dump(adapter, adapter.validate_python(value)).encode()
    except ValidationError as error:
        raise InvalidInput(
            f"the input does not fit: {dump_error(error)['message']}", param="input"
        ) from error


def child_id(org_id: int, run_id: uuid.UUID, step_key: str) -> uuid.UUID:
    """Return a child's id: below the time of now, as every run's, it is made of its step's key."""
    digest = hashlib.sha256(f"{org_id}\n{run_id}\n{step_key}".encode()).digest()
    low = int.from_bytes(digest[:8], "big") & ((1 << 62) - 1)
    return uuid.UUID(int=new_id().int >> 62 << 62 | low)


async def _record_child(
    database: EngineDatabase,
    lease: Lease,
    step_key: str,
    seq: int | None,
    name: str,
    wish: _Wish,
) -> tuple[uuid.UUID, str]:
    """Submit a child and record the step that starts it; returns its id and the queue to hint."""
    org_id, run_id = lease.org_id, lease.run_id
    async with database.duty("child") as con:
        await hold(con, lease)
        known = await con.fetchval(_SQL["known"], org_id, run_id, step_key)
        if known is not None:
            return known, wish.queue or ""
        intent = await _intent(con, lease, step_key, wish)
        output = orjson.dumps({"run_id": str(intent.run_id)}).decode()
        await con.execute(
            _SQL["record_child"],
            org_id,
            run_id,
            step_key,
            name,
            output,
            intent.run_id,
            lease.attempt,
            seq,
        )
        await check_fits(con, org_id, [intent])
        await submit(con, [intent])
        data = {"name": name, "run_id": str(intent.run_id), "flow": intent.flow}
        fact = Fact("child.started", step_key, data)
        duties = NO_DUTY if wish.close == "abandon" else Duty.CHILDREN
        await append(con, org_id, run_id, [fact], duties=duties)
    return intent.run_id, intent.queue


async def _intent(con: Connection, lease: Lease, step_key: str, wish: _Wish) -> Intent:
    basis = await con.fetchrow(_SQL["basis"], lease.org_id, lease.run_id, MAX_GENERATIONS)
    assert basis is not None
    if basis["generations"] >= MAX_GENERATIONS:
        raise Permanent(
            f"children of children go at most {MAX_GENERATIONS} generations deep",
            code="too_deep",
            advice="look whether a flow starts itself; ctx.continue_as goes on without going deeper",
        )
    version, queue, timeout_s = wish.version, wish.queue, wish.timeout_s
    deadline_s, keys = wish.deadline_s, wish.keys
    urgency = lesser(wish.urgency, basis["urgency"])
    found = None
    if version is None or queue is None:
        found = await published(con, wish.flow, version)
        version, queue = found["version"], queue or found["queue"]
    elif wish.is_by_name:  # it may be one that no worker has yet
        found = await con.fetchrow(_SQL["published"], wish.flow, version)
        urgency = urgency if found is not None else STANDARD
    if found is not None:
        timeout_s = timeout_s or found["timeout_s"]
        keys = check_keys((), declared=[*found["keys"], *keys])
        urgency = lesser(urgency, found["urgency"])
        deadline_s = deadline_of(found["deadline_s"], given_s=deadline_s, delay_s=wish.delay_s)
    return Intent(
        org_id=lease.org_id,
        flow=wish.flow,
        version=version,
        queue=queue,
        input=wish.input,
        subject=basis["subject"],
        priority=basis["priority"] if wish.priority is None else wish.priority,
        delay_s=wish.delay_s,
        keys=keys,
        timeout_s=timeout_s,
        traceparent=basis["traceparent"],
        labels=orjson.loads(basis["labels"]) if wish.labels is None else wish.labels,
        run_id=child_id(lease.org_id, lease.run_id, step_key),
        deadline_s=deadline_s,
        parent=Parent(run_id=lease.run_id, step_key=step_key, close_policy=wish.close),
        backing=_backing(step_key, basis),
        behind=basis["behind"] or (),
        urgency=urgency,
    )


def _backing(step_key: str, basis: Record) -> Backing | None:
    """Return what a child's rights stand on: what an ending starts is part of it, and needs no right either."""
    backing = backing_of(basis)
    if backing is None or not step_key.startswith(ENDINGS):
        return backing
    return backing.unasked()


async def published(con: Connection, flow: str, version: int | None) -> Record:
    """Return version, queue and time limit of a published flow; raises NotFound."""
    found = await con.fetchrow(_SQL["published"], flow, version)
    if found is None:
        wanted = flow if version is None else f"{flow}@{version}"
        raise NotFound(
            f"no worker has published the flow {wanted}", code="flow_not_found", param="flow"
        )
    return found


async def _record_join(
    database: EngineDatabase, lease: Lease, step_key: str, seq: int | None, child: Child
) -> Recorded | None:
    """Store that the run waits for a child; returns how that ended, where it already has."""
    org_id, run_id = lease.org_id, lease.run_id
    async with database.duty("join") as con:
        await hold(con, lease)
        is_new = await con.fetchval(
            _SQL["record_join"],
            org_id,
            run_id,
            step_key,
            child.name,
            child.run_id,
            lease.attempt,
            seq,
        )
        # Read after the lock: a child that ends later finds the step just stored.
        last = await con.fetchrow(_SQL["last_of_chain"], org_id, child.run_id)
        if last is None:
            raise NotFound(f"child run {child.run_id} does not exist", code="child_gone")
        if last["outcome"] is None:
            if last["parent_id"] != run_id:
                raise Permanent(
                    f"run {child.run_id} is another run's child and still runs", code="not_my_child"
                )
            return None
        if is_new:
            await endings.end_joins(con, [(org_id, last["run_id"], run_id, child.run_id)])
        row = await con.fetchrow(_SQL["joined"], org_id, run_id, step_key)
        assert row is not None
        return just("join", row["state"], row["output"], row["error"])
