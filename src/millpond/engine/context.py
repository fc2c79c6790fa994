"""Context: what flow code calls; each call is a durable checkpoint, replayed from its record.

Called by flow functions, one Context per attempt. Invariants: a recorded step returns its result and
a recorded failure is raised again, neither runs again; all durable writes are fenced by the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar, overload

import orjson
from pydantic import TypeAdapter

from millpond.engine import questions, waits
from millpond.engine.branches import Branch, Branches, Unwind, refuse_secret
from millpond.engine.calling import Caller, refuse_queue, unregistered_manner
from millpond.engine.checkpoints import MAX_STEPS, refuse_more
from millpond.engine.children import Child, ChildFailed
from millpond.engine.continuing import Continuing
from millpond.engine.duties import Duty
from millpond.engine.encoding import dump, veiled
from millpond.engine.fanning import Fanning
from millpond.engine.history import History, Mismatch, Places, Recorded
from millpond.engine.leases import Claimed
from millpond.engine.metering import Spent
from millpond.engine.needs import Ask
from millpond.engine.performing import HOLD_S, Performer
from millpond.engine.plans import InputExpired, Plan, StepFailed, failure
from millpond.engine.recording import Held
from millpond.engine.registry import Step, place_of
from millpond.engine.rights import right_of
from millpond.engine.scope import Scope
from millpond.engine.signals import Signal, Signals, SignalTimedOut
from millpond.engine.step_context import StepContext, resource
from millpond.engine.values import Values
from millpond.errors import InvalidInput, MillpondError, Permanent
from millpond.retry import Retry
from millpond.types import Json

__all__ = [
    "Child",
    "ChildFailed",
    "Context",
    "Decision",
    "InputExpired",
    "Scope",
    "Signal",
    "SignalTimedOut",
    "StepContext",
    "StepFailed",
]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision(Generic[A]):
    """A human's answer; `resolved_by` is None when it is the default of an expired question."""

    answer: A
    resolved_by: str | None
    is_expired: bool


class Context(Fanning, Signals, Continuing, Values):
    """One attempt of a run, as its flow code sees it."""

    # What most attempts never have stands here once for all of them.
    mismatch: Mismatch | None = None
    _calls: Caller | None = None
    _continuation = None

    def __init__(
        self,
        claimed: Claimed,
        history: History,
        scope: Scope,
        *,
        input_type: TypeAdapter[Any] | None = None,
        performer: Callable[..., Performer] | None = None,
        heeds_cancel: bool = True,
        opens: Callable[[str], Awaitable[str]] | None = None,
    ) -> None:
        self._claimed = claimed
        lease = self._lease = claimed.lease
        self._history = history
        self._places = Places(history) if history else None
        self._heeds_cancel = heeds_cancel
        self._scope = scope
        self._branches = Branches(scope.loop)
        self._branches.on_mixed = partial(scope.mixed.add, lease)
        # Of seats its branches are to know before they begin.
        is_made = performer is not None or claimed.seats
        self._made = self._make(performer or Performer) if is_made else None
        self._opens = opens
        self.org_id, _, self.run_id, self.attempt, _ = lease
        self.subject = claimed.subject
        self._steps = len(history)
        self._unjoined = {}
        self._input_type = input_type

    def _make(self, kind: Callable[..., Performer]) -> Performer:
        claimed = self._claimed
        return kind(
            claimed.lease,
            self._scope,
            self._branches,
            flow=(claimed.flow, claimed.version),
            # Nothing of endings is left to the run's end: that is theirs already.
            is_obliged=not self._heeds_cancel
            or (claimed.duties > 0 and Duty.ENDING in Duty(claimed.duties)),
            # Endings undo what was done: they need no right.
            right=right_of(self._scope.asking, claimed) if self._heeds_cancel else None,
            seats=claimed.seats,
            begin_by=claimed.begin_by,
        )

    @property
    def _caller(self) -> Caller:
        if self._calls is None:
            self._calls = Caller(
                self._claimed, self._scope, self._performer, self._branches, self._opens
            )
        return self._calls

    def get(self, kind: type[R]) -> R:
        """Return the worker's resource of a type; raises Permanent when it has none."""
        return resource(self._scope.resources, kind)

    def idempotency_key(self, name: str) -> str:
        """Return a key of this run for what happens outside steps, such as a message's id."""
        return f"{self.org_id}:{self.run_id}:{name}"

    @overload
    async def step(self, step: Step[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    async def step(self, step: Step[..., R], /, *args: Any, queue: str, **kwargs: Any) -> R: ...

    @overload
    async def step(
        self, step: Step[..., R], /, *args: Any, undo: Step[[R], Any], **kwargs: Any
    ) -> R: ...

    @overload
    async def step(
        self,
        step: str,
        function: Callable[..., Awaitable[R]],
        /,
        *args: Any,
        retry: Retry = ...,
        timeout_s: float | None = ...,
        output: Any = ...,
        undo: Step[[R], Any] | None = ...,
        keys: Sequence[str] = ...,
        tokens: int = ...,
    ) -> R: ...

    @overload
    async def step(
        self,
        step: str,
        function: Callable[..., R],
        /,
        *args: Any,
        retry: Retry = ...,
        timeout_s: float | None = ...,
        output: Any = ...,
        keys: Sequence[str] = ...,
        tokens: int = ...,
    ) -> R: ...

    async def step(self, step: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a step once and record it, or return its record.

        A registered step is called with a StepContext before `args`; a name is followed by a function,
        called with `args`. With `queue`, or one of its own, a registered step executes there: its
        arguments go as JSON. Raises StepFailed when its last try failed. `undo` is a registered step
        that is performed with the result if the run finally fails or is cancelled. With `keys`, such as
        `provider:openai`, or those of a registered step, each try waits for room under their limits; `tokens` is about
        how many of them it uses.
        """
        branch = self._branches.here()
        undo: Step[Any, Any] | None = kwargs.pop("undo", None) if kwargs else None
        elsewhere: str | None = None
        call: Callable[[], Awaitable[Any]]
        if isinstance(step, Step):
            elsewhere = self._caller.elsewhere(step, kwargs.pop("queue", None))
            key = branch.key(step.name)
            plan = Plan(step.name, key, step.manner, undo)
            call = partial(self._caller.call, step, plan, args, kwargs)
        else:
            if kwargs:
                refuse_queue(step, kwargs)
            function, *rest = args
            key = branch.key(step)
            plan = Plan(step, key, unregistered_manner(step, function, kwargs), undo)
            if place_of(function) != "loop":
                call = partial(self._caller.call_plain, function, rest)
            else:
                call = partial(function, *rest) if rest else function
        recorded = self._lookup(key, "step")
        if undo is not None:
            await self._performer.oblige()
        if recorded is not None:
            if recorded.state in ("done", "failed"):
                value = plan.result_of(recorded)
                self._performer.given(plan, recorded, value)
                return value
            if recorded.state == "waiting" or not recorded.is_due:
                recorded = await self._branches.park(branch, key, is_human=False)
        if elsewhere is not None and (recorded is None or recorded.state == "retrying"):
            await self._caller.send(step, plan, elsewhere, args, kwargs)
            recorded = await self._branches.park(branch, key, is_human=False)
        performer = self._made or self._performer
        return await performer.perform(branch, plan, call, recorded)

    async def secret(self, name: str) -> str:
        """Open one of the org's secrets; from now on its value is hidden in all that this run leaves behind.

        It is read anew by each call and each attempt, and is no step. Raises NotFound; Forbidden where the run
        may not act for its subject any more, and in every run that was started under a grant.
        """
        self._branches.here()
        return await self._caller.open(name)

    async def sleep(self, seconds: float, name: str = "sleep") -> None:
        """Wait for a time by the database's clock, over restarts; above 1 s no slot is held."""
        if not 0 <= seconds <= 366 * 86_400 * 10:
            raise InvalidInput("sleep takes from 0 seconds to ten years", param="seconds")
        branch = self._branches.here()
        key = branch.key(name)
        recorded = self._lookup(key, "sleep")
        if recorded is not None and recorded.state == "done":
            return
        if recorded is None:
            if seconds <= HOLD_S:
                await self._performer.own(asyncio.sleep(seconds))
                data = {"name": name, "duration_s": seconds}
                await self._performer.record(
                    key, name, "sleep.ended", data, kind="sleep", state="done"
                )
                return
            place = branch.places[key]
            await self._performer.persist(
                lambda: waits.record_sleep(
                    self._scope.database,
                    self._lease,
                    step_key=key,
                    name=name,
                    seconds=seconds,
                    seq=place,
                )
            )
        await self._branches.park(branch, key, is_human=False)

    @overload
    async def ask_human(
        self,
        name: str,
        *,
        role: str,
        form: type[A],
        proposal: Any = ...,
        title: str = ...,
        expires_in_s: float | None = ...,
        default: A | None = ...,
    ) -> Decision[A]: ...

    @overload
    async def ask_human(
        self,
        name: str,
        *,
        role: str,
        form: Mapping[str, Json],
        proposal: Any = ...,
        title: str = ...,
        expires_in_s: float | None = ...,
        default: Json = ...,
    ) -> Decision[Json]: ...

    async def ask_human(
        self,
        name: str,
        *,
        role: str,
        form: Any,
        proposal: Any = None,
        title: str = "",
        expires_in_s: float | None = None,
        default: Any = None,
    ) -> Decision[Any]:
        """Ask a person with `role` and wait, holding nothing, until one decides or time is up.

        `form` is a pydantic model or a JSON schema of the answer, `proposal` what is to be approved.
        When it expires, `default` is the answer; without one InputExpired is raised.
        """
        branch = self._branches.here()
        key = branch.key(name)
        adapter = None if isinstance(form, Mapping) else TypeAdapter(form)
        question = questions.Question(
            name=name,
            role=role,
            title=veiled(title or name),
            form=orjson.loads(dump(None, dict(form) if adapter is None else adapter.json_schema())),
            proposal=orjson.loads(dump(None, proposal)),
            expires_in_s=expires_in_s,
            expiry_answer=None if default is None else orjson.loads(dump(adapter, default)),
        )
        recorded = self._lookup(key, "input")
        if recorded is None:
            place = branch.places[key]
            await self._performer.persist(
                lambda: questions.record_question(
                    self._scope.database,
                    self._lease,
                    step_key=key,
                    question=question,
                    seq=place,
                )
            )
        if recorded is None or recorded.state == "waiting":
            recorded = await self._branches.park(branch, key, is_human=True)
        return _decision(name, recorded, question, adapter)

    async def emit(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Store a progress event, once: a replay does not store it again."""
        branch = self._branches.here()
        key = branch.key(f"emit {name}")
        if self._lookup(key, "emit") is None:
            body = {**(data or {}), "name": name}
            await self._performer.record(key, name, "progress", body, kind="emit", state="done")

    # What follows is for the engine.

    def unwind(self, reason: str) -> None:
        """End this attempt's flow code from outside; endings do not heed a cancel."""
        if self._heeds_cancel or reason != "cancelled":
            self._branches.close(reason)

    @property
    def is_obliged(self) -> bool:
        """Whether something is to be done before this run may fail or be cancelled."""
        return self._performer.is_obliged

    async def oblige(self) -> None:
        """Set that durably."""
        await self._performer.oblige()

    @property
    def closed(self) -> str | None:
        """Why this attempt's flow code was ended from outside, if it was."""
        return self._branches.closed

    @property
    def parked(self) -> list[tuple[str, bool]]:
        """The step keys that this attempt waits on, each with whether a human decides it.

        Steps that need room are among them as far as they stand in line.
        """
        lined = set(self._branches.lined)
        return [
            (one.step_key, one.is_human)
            for one in self._branches.parked
            if one.ask is None or one in lined
        ]

    @property
    def asks(self) -> dict[str, Ask]:
        """What this attempt's steps wait for in line, by step key."""
        return {one.step_key: one.ask for one in self._branches.lined if one.ask is not None}

    def begin(self) -> asyncio.Task[Any]:
        """Make the current task the flow's own strand, and return it."""
        # The loop is named: to find it would be a system call, which costs what comes after it dear, too.
        task = asyncio.current_task(self._scope.loop)
        assert task is not None
        self._branches.enter(task, Branch(""))
        return task

    def take_held(self) -> Held | None:
        """Hand out, once, the result of the last step where its record may go with the run's end."""
        return None if self._made is None else self._made.take_held()

    @property
    def unstorable(self) -> MillpondError | None:
        """What refused to store a step's result and its failure, where that ended this attempt."""
        return None if self._made is None else self._made.unstorable

    async def catch_up(self, held: Held | None = None, *, only_sent: bool = False) -> None:
        """Wait until the result that the flow got last is durable, or one that was handed out; raises Unwind.

        With `only_sent`, what is not on its way by itself stays held.
        """
        made = self._made
        if made is not None and (made.is_behind or not only_sent):
            await made.catch_up(held)

    async def settled(self) -> None:
        """Wait until every record of this attempt is stored or refused."""
        if self._made is not None:
            await self._made.settled()

    def take_unrecorded(self) -> Sequence[Spent]:
        """Hand out, once, what tries used on models that were ended from outside before their record."""
        return () if self._made is None else self._made.take_unrecorded()

    async def persist(self, write: Callable[[], Awaitable[R]]) -> R:
        """Do what needs the database, again while that is out of reach."""
        return await self._performer.persist(write)

    async def await_answer(self, key: str) -> None:
        """Park until a human has answered what is asked about a step."""
        await self._branches.park(self._branches.here(), key, is_human=True)

    def move(self, path: str) -> None:
        """Let the calls that follow stand in a branch of their own, beside the flow's."""
        self._branches.here().move(path)

    def end(self, task: asyncio.Task[Any]) -> None:
        """Forget the flow's own strand; nothing cancels its task any more."""
        self._branches.leave(task)

    def _lookup(self, key: str, kind: str) -> Recorded | None:
        """Return the record of a key; ends the attempt when another stands at this place.

        Raises Permanent where one more than a run may have would be recorded, InvalidInput where its name shows a
        secret; what was recorded before that secret was opened is given out.
        """
        if self._places is not None:
            place = self._branches.here().places.get(key)
            self.mismatch = self._places.mismatch(key, kind, place)
            if self.mismatch is not None:
                self._branches.close("blocked")
                raise Unwind("blocked")
        recorded = self._history.get(key)
        if recorded is None:
            refuse_secret(key)
            self._steps += 1
            if self._steps > MAX_STEPS:
                refuse_more()
        return recorded


def _decision(
    name: str, recorded: Recorded, question: questions.Question, adapter: TypeAdapter[Any] | None
) -> Decision[Any]:
    if recorded.state == "failed":
        raise failure(name, orjson.loads(recorded.error or "{}"))
    output = orjson.loads(recorded.output or "{}")
    if output["digest"] != question.digest().hex():
        raise Permanent(
            f"what {name} asked to approve has changed since a human decided on it",
            code="approval_mismatch",
            advice="make the proposal from recorded steps only",
        )
    answer = output["answer"]
    return Decision(
        answer=answer if adapter is None else adapter.validate_python(answer),
        resolved_by=output["resolved_by"],
        is_expired=output["is_expired"],
    )
