"""Family: children that many runs start and join at once share transactions.

Called by `children`, one Family per session of a worker. Invariants: a child is submitted in the transaction that
records the step which starts it, under the lock of its parent's live row; a join looks for the child's end under the
lock that this end takes too, so that it is never missed; live rows are locked in the order of group commits.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import endings
from millpond.engine.duties import NO_DUTY, Duty
from millpond.engine.fitting import check_fits
from millpond.engine.history import Recorded, just
from millpond.engine.keying import check_keys
from millpond.engine.leases import Lease, hold_free
from millpond.engine.rights import ENDINGS, backing_of
from millpond.engine.sharing import AGAIN, Again, Shared
from millpond.engine.submit import check, deadline_of, submit
from millpond.errors import InvalidInput, LeaseLost, NotFound, Permanent
from millpond.types import STANDARD, Backing, ClosePolicy, Intent, Parent, Urgency, lesser, new_id

_SQL = queries("children")
# A flow that starts itself by mistake ends here.
MAX_GENERATIONS = 32
# A child's id and the queue to hint.
_Started: TypeAlias = tuple[uuid.UUID, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Birth:
    """A child to start at a step called `name`, whose place in its branch is `seq`."""

    lease: Lease
    step_key: str
    seq: int | None
    name: str
    wish: Wish


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """A wait for the end of the child `child_id`, called `name`, at a step whose place in its branch is `seq`."""

    lease: Lease
    step_key: str
    seq: int | None
    name: str
    child_id: uuid.UUID


class Family:
    """Starts and joins children; a start returns the child's id and the queue to hint."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._births: Shared[Birth, _Started] = Shared(
            self._start, weight=lambda birth: len(birth.wish.input)
        )
        self._joins: Shared[Join, Recorded | None] = Shared(self._join)

    def start(self, birth: Birth) -> asyncio.Future[_Started]:
        """Submit a child and record the step that starts it; returns its id and the queue to hint."""
        return self._births.ask(birth)

    def join(self, join: Join) -> asyncio.Future[Recorded | None]:
        """Store that a run waits for a child; returns how that ended, where it already has."""
        return self._joins.ask(join)

    async def close(self) -> None:
        """Stop; whoever still waits gets LeaseLost."""
        await self._births.close()
        await self._joins.close()

    async def _start(self, births: Sequence[Birth]) -> list[_Started | Exception | Again]:
        fresh: list[tuple[Birth, Intent]] = []
        flows = _Flows()
        async with self._database.duty("child") as con:
            held, answers = await _hold(con, births)
            rows = await con.fetch(
                _SQL["basis"], *_keys([births[nth] for nth in held]), MAX_GENERATIONS
            )
            for nth, basis in zip(held, rows, strict=True):
                birth = births[nth]
                if basis["known"] is not None:
                    answers[nth] = basis["known"], birth.wish.queue or ""
                    continue
                try:
                    intent = await _intent(con, birth, basis, flows)
                    check(intent, birth.lease.org_id)
                    await check_fits(con, birth.lease.org_id, [intent])
                except (InvalidInput, NotFound, Permanent) as error:
                    # The database's own errors are other ones within its blocks.
                    answers[nth] = error
                else:
                    answers[nth] = intent.run_id, intent.queue
                    fresh.append((birth, intent))
            if fresh:
                await _store(con, fresh)
        return answers

    async def _join(self, joins: Sequence[Join]) -> list[Recorded | Exception | Again | None]:
        async with self._database.duty("join") as con:
            held, answers = await _hold(con, joins)
            ours = [joins[nth] for nth in held]
            children = [join.child_id for join in ours]
            rows = await con.fetch(
                _SQL["record_joins"],
                *_keys(ours),
                [join.name for join in ours],
                children,
                [join.lease.attempt for join in ours],
                [join.seq for join in ours],
            )
            new = {(row["org_id"], row["run_id"], row["step_key"]) for row in rows}
            # Read after the lock: a child that ends later finds the step just stored.
            orgs = [join.lease.org_id for join in ours]
            rows = await con.fetch(_SQL["last_of_chains"], orgs, children)
            lasts = {row["ord"]: row for row in rows}
            for ordinal, (nth, join) in enumerate(zip(held, ours, strict=True), 1):
                is_new = (join.lease.org_id, join.lease.run_id, join.step_key) in new
                answers[nth] = await _outcome(con, join, lasts.get(ordinal), is_new=is_new)
        return answers


async def _hold(
    con: Connection, asking: Sequence[Birth] | Sequence[Join]
) -> tuple[list[int], list[Any]]:
    """Lock the live rows of runs that nobody else holds; returns positions, and answers for all that are not held."""
    seen = await hold_free(con, [one.lease for one in asking])
    answers: list[Exception | Again] = [LeaseLost("the lease is gone")] * len(asking)
    for nth in seen:
        answers[nth] = AGAIN
    return [nth for nth, is_cancelled in seen.items() if is_cancelled is not None], answers


def _keys(
    asking: Sequence[Birth] | Sequence[Join],
) -> tuple[list[int], list[uuid.UUID], list[str]]:
    return (
        [one.lease.org_id for one in asking],
        [one.lease.run_id for one in asking],
        [one.step_key for one in asking],
    )


async def _store(con: Connection, fresh: Sequence[tuple[Birth, Intent]]) -> None:
    """Submit children, and record the steps that start them with their events."""
    by_org: dict[int, list[Intent]] = {}
    for _, intent in fresh:
        by_org.setdefault(intent.org_id, []).append(intent)
    for intents in by_org.values():
        await submit(con, intents)
    births = [birth for birth, _ in fresh]
    told = [
        {"name": birth.name, "run_id": str(intent.run_id), "flow": intent.flow}
        for birth, intent in fresh
    ]
    await con.execute(
        _SQL["record_children"],
        *_keys(births),
        [birth.name for birth in births],
        [orjson.dumps({"run_id": str(intent.run_id)}).decode() for _, intent in fresh],
        [intent.run_id for _, intent in fresh],
        [birth.lease.attempt for birth in births],
        [birth.seq for birth in births],
        [orjson.dumps(one).decode() for one in told],
        [int(NO_DUTY if one.wish.close == "abandon" else Duty.CHILDREN) for one in births],
    )


def child_id(org_id: int, run_id: uuid.UUID, step_key: str) -> uuid.UUID:
    """Return a child's id: below the time of now, as every run's, it is made of its step's key."""
    digest = hashlib.sha256(f"{org_id}\n{run_id}\n{step_key}".encode()).digest()
    low = int.from_bytes(digest[:8], "big") & ((1 << 62) - 1)
    return uuid.UUID(int=new_id().int >> 62 << 62 | low)


class _Flows:
    """Flows as workers have published them, each looked up once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int | None], Record | None] = {}

    async def find(self, con: Connection, flow: str, version: int | None) -> Record | None:
        """Return version, queue and limits of a flow, None where nobody has published it."""
        key = flow, version
        if key not in self._found:
            self._found[key] = await con.fetchrow(_SQL["published"], flow, version)
        return self._found[key]


async def _intent(con: Connection, birth: Birth, basis: Record, flows: _Flows) -> Intent:
    """Return the run to submit; raises Permanent, NotFound, or InvalidInput where there can be none."""
    if basis["generations"] >= MAX_GENERATIONS:
        raise Permanent(
            f"children of children go at most {MAX_GENERATIONS} generations deep",
            code="too_deep",
            advice="look whether a flow starts itself; ctx.continue_as goes on without going deeper",
        )
    lease, step_key, wish = birth.lease, birth.step_key, birth.wish
    version, queue, timeout_s = wish.version, wish.queue, wish.timeout_s
    deadline_s, keys = wish.deadline_s, wish.keys
    urgency = lesser(wish.urgency, basis["urgency"])
    found = None
    if version is None or queue is None:
        found = _known(await flows.find(con, wish.flow, version), wish.flow, version)
        version, queue = found["version"], queue or found["queue"]
    elif wish.is_by_name:  # it may be one that no worker has yet
        found = await flows.find(con, wish.flow, version)
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
    return _known(await _Flows().find(con, flow, version), flow, version)


def _known(found: Record | None, flow: str, version: int | None) -> Record:
    if found is None:
        wanted = flow if version is None else f"{flow}@{version}"
        raise NotFound(
            f"no worker has published the flow {wanted}", code="flow_not_found", param="flow"
        )
    return found


async def _outcome(
    con: Connection, join: Join, last: Record | None, *, is_new: bool
) -> Recorded | None:
    """Return how a child ended, recorded in the join that found it over; None while it goes on.

    Raises what the join itself is at fault for: nothing of it is stored then.
    """
    org_id, run_id = join.lease.org_id, join.lease.run_id
    if last is None:
        raise NotFound(f"child run {join.child_id} does not exist", code="child_gone")
    if last["outcome"] is None:
        if last["parent_id"] != run_id:
            raise Permanent(
                f"run {join.child_id} is another run's child and still runs", code="not_my_child"
            )
        return None
    if is_new:
        await endings.end_joins(con, [(org_id, last["run_id"], run_id, join.child_id)])
    row = await con.fetchrow(_SQL["joined"], org_id, run_id, join.step_key)
    assert row is not None
    return just("join", row["state"], row["output"], row["error"])
