"""Context: what flow code calls; each call is a durable checkpoint, replayed from its record.

Called by flow functions, one Context per attempt. Invariants: a recorded step returns its result and
a recorded failure is raised again, neither runs again; all durable writes are fenced by the lease.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload

import orjson
from pydantic import TypeAdapter

from millpond.db.pool import EngineDatabase
from millpond.engine import waits
from millpond.engine.branches import Branch, Branches, Unwind
from millpond.engine.claim import Claimed
from millpond.engine.commit import Committer, StepWrite
from millpond.engine.encoding import dump, dump_error, load, output_of
from millpond.engine.history import History, Recorded
from millpond.engine.registry import Step
from millpond.errors import InvalidInput, LeaseLost, Permanent, Transient
from millpond.retry import DEFAULT_RETRY, Retry, backoff_s, classify, retry_after_s
from millpond.types import Json

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")

# A backoff or sleep above this is a wait: recorded, and the slot is given back.
HOLD_S = 1.0
# A step that lasts longer is announced by an event of its own.
ANNOUNCE_S = 0.05


class StepFailed(Exception):
    """A step ended in failure after its last try; raised in the flow, also on replay."""

    def __init__(self, step: str, *, error_class: str, code: str, message: str) -> None:
        super().__init__(f"step {step} failed: {error_class}: {message}")
        self.step = step
        self.error_class = error_class
        self.code = code
        self.message = message


class InputExpired(StepFailed):
    """Nobody decided in time, and the question had no default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision(Generic[A]):
    """A human's answer; `resolved_by` is None when it is the default of an expired question."""

    answer: A
    resolved_by: str | None
    is_expired: bool


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What one worker gives to all its attempts. `resources` are instances by their type."""

    database: EngineDatabase
    committer: Committer
    resources: Mapping[type, object]


class StepContext:
    """What a registered step gets as its first argument."""

    def __init__(self, context: Context, key: str, name: str, try_number: int) -> None:
        self._context = context
        self._key = key
        self._name = name
        self.try_number = try_number
        self.org_id = context.org_id
        self.run_id = context.run_id
        self.subject = context.subject

    @property
    def idempotency_key(self) -> str:
        """The key to pass to whatever this step calls; the same for every try."""
        return f"{self.org_id}:{self.run_id}:{self._key}"

    def get(self, kind: type[R]) -> R:
        """Return the worker's resource of a type; raises Permanent when it has none."""
        return self._context.get(kind)

    async def emit(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Store a progress event; a further try of the step may store it again."""
        body = {"name": name, **(data or {})}
        await self._context._event(self._key, self._name, "progress", body)


class Context:
    """One attempt of a run, as its flow code sees it."""

    def __init__(self, claimed: Claimed, history: History, scope: Scope) -> None:
        self._lease = claimed.lease
        self._history = history
        self._scope = scope
        self._branches = Branches()
        self._current_step: tuple[str, int] | None = None
        self.org_id = claimed.lease.org_id
        self.run_id: uuid.UUID = claimed.lease.run_id
        self.attempt = claimed.lease.attempt
        self.subject = claimed.subject

    def get(self, kind: type[R]) -> R:
        """Return the worker's resource of a type; raises Permanent when it has none."""
        found = self._scope.resources.get(kind)
        if not isinstance(found, kind):
            raise Permanent(f"this worker has no {kind.__name__}", code="no_resource")
        return found

    def idempotency_key(self, name: str) -> str:
        """Return a key of this run for what happens outside steps, such as a message's id."""
        return f"{self.org_id}:{self.run_id}:{name}"

    @overload
    async def step(self, step: Step[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

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
    ) -> R: ...

    async def step(self, step: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a step once and record it, or return its record.

        A registered step is called with a StepContext before `args`; a name is followed by an async
        function, called with `args`. Raises StepFailed when its last try failed.
        """
        branch = self._branches.here()
        if isinstance(step, Step):
            key = branch.key(step.name)
            plan = _Plan(step.name, key, step.retry, step.timeout_s, step.output)

            def call(try_number: int) -> Awaitable[Any]:
                first = StepContext(self, key, step.name, try_number)
                return step.function(first, *args, **kwargs)

        else:
            function, rest = args[0], args[1:]
            key = branch.key(step)
            plan = _Plan(
                step,
                key,
                kwargs.get("retry", DEFAULT_RETRY),
                kwargs.get("timeout_s"),
                _adapter(kwargs.get("output"), function),
            )

            def call(try_number: int) -> Awaitable[Any]:
                return function(*rest)  # type: ignore[no-any-return]

        recorded = self._lookup(key, "step")
        if recorded is not None:
            if recorded.state in ("done", "failed"):
                return _replayed(plan.name, recorded, plan.output)
            if not recorded.is_due:
                await self._branches.park(branch, key, is_human=False)
        return await self._perform(branch, plan, call, recorded)

    async def parallel(self, *branches: Awaitable[Any]) -> tuple[Any, ...]:
        """Run coroutines side by side, each a branch, and return their results in order.

        Waits for all of them; then raises the failure of the first by position, if any failed.
        """
        parent = self._branches.here()
        fork = parent.fork()
        if not branches:
            return ()
        left = len(branches)

        async def run(index: int, body: Awaitable[Any]) -> Any:
            nonlocal left
            self._branches.open(f"{fork}.{index}/")
            try:
                return await body
            except asyncio.CancelledError as error:
                raise Unwind(self._branches.closed or "cancelled") from error
            finally:
                self._branches.leave()
                left -= 1
                if left == 0:
                    self._branches.go(1)
                self._branches.rest(1)

        tasks = [asyncio.ensure_future(run(n, body)) for n, body in enumerate(branches)]
        # The children count themselves in as they start; until then the parent stands for them.
        await self._own(asyncio.sleep(0))
        self._branches.rest(1)
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5)
            raise Unwind(self._branches.closed or "cancelled") from error
        errors = [task.exception() for task in tasks]
        for unwind in errors:
            if isinstance(unwind, Unwind):
                raise unwind
        for failure in errors:
            if failure is not None:
                raise failure
        return tuple(task.result() for task in tasks)

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
                await self._own(asyncio.sleep(seconds))
                data = {"name": name, "duration_s": seconds}
                await self._record(key, name, "sleep.ended", data, kind="sleep", state="done")
                return
            await self._persist(
                lambda: waits.record_sleep(
                    self._scope.database, self._lease, step_key=key, name=name, seconds=seconds
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
        question = waits.Question(
            name=name,
            role=role,
            title=title or name,
            form=dict(form) if adapter is None else adapter.json_schema(),
            proposal=orjson.loads(dump(None, proposal)),
            expires_in_s=expires_in_s,
            expiry_answer=None if default is None else orjson.loads(dump(adapter, default)),
        )
        recorded = self._lookup(key, "input")
        if recorded is None:
            await self._persist(
                lambda: waits.record_question(
                    self._scope.database, self._lease, step_key=key, question=question
                )
            )
        if recorded is None or recorded.state == "waiting":
            await self._branches.park(branch, key, is_human=True)
        assert recorded is not None
        return _decision(name, recorded, question, adapter)

    async def emit(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Store a progress event, once: a replay does not store it again."""
        branch = self._branches.here()
        key = branch.key(f"emit {name}")
        if self._lookup(key, "emit") is None:
            body = {"name": name, **(data or {})}
            await self._record(key, name, "progress", body, kind="emit", state="done")

    # What follows is for the engine.

    def unwind(self, reason: str) -> None:
        """End this attempt's flow code from outside."""
        self._branches.close(reason)

    @property
    def closed(self) -> str | None:
        """Why this attempt's flow code was ended from outside, if it was."""
        return self._branches.closed

    @property
    def parked(self) -> list[tuple[str, bool]]:
        """The step keys that this attempt waits on, each with whether a human decides it."""
        return self._branches.parked

    def begin(self) -> None:
        """Make the current task the flow's own strand."""
        self._branches.open("")

    @property
    def deadline(self) -> float | None:
        """When the first of the running steps is over its time, on the loop's clock."""
        return self._branches.deadline()

    def end(self) -> None:
        """Forget the flow's own strand; nothing cancels its task any more."""
        self._branches.leave()

    def _lookup(self, key: str, kind: str) -> Recorded | None:
        recorded = self._history.get(key)
        if recorded is not None and recorded.kind != kind:
            raise Permanent(
                f"the history has a {recorded.kind} at {key}, the code asks for a {kind}",
                code="history_mismatch",
                advice="register the changed flow under a new version",
            )
        return recorded

    async def _perform(
        self,
        branch: Branch,
        plan: _Plan,
        call: Callable[[int], Awaitable[Any]],
        recorded: Recorded | None,
    ) -> Any:
        """Try until there is a result, a failure, or a backoff long enough to park."""
        loop = asyncio.get_running_loop()
        tries = recorded.tries if recorded else 0
        began = loop.time() - (recorded.age_s if recorded else 0.0)
        while True:
            tries += 1
            try_began = loop.time()
            try:
                value = await self._try(branch, plan, call, tries)
                text = dump(plan.output, value)
            except Exception as error:
                delay_s = await self._failed_try(plan, error, tries, loop.time() - began)
            else:
                data = {
                    "name": plan.name,
                    "tries": tries,
                    "duration_s": round(loop.time() - try_began, 6),
                }
                await self._record(
                    plan.key,
                    plan.name,
                    "step.succeeded",
                    data,
                    state="done",
                    output=text,
                    tries=tries,
                    duration_s=loop.time() - began,
                )
                return value if plan.output is not None else orjson.loads(text)
            if delay_s > HOLD_S:
                await self._persist(
                    lambda delay_s=delay_s: waits.record_backoff(  # type: ignore[misc]
                        self._scope.database, self._lease, step_key=plan.key, delay_s=delay_s
                    )
                )
                await self._branches.park(branch, plan.key, is_human=False)
            await self._own(asyncio.sleep(delay_s))

    async def _try(
        self, branch: Branch, plan: _Plan, call: Callable[[int], Awaitable[Any]], tries: int
    ) -> Any:
        """Execute a step's function once, within its time limit."""
        loop = asyncio.get_running_loop()
        announce = loop.call_later(ANNOUNCE_S, self._announce, plan, tries)
        branch.is_in_step = True
        if plan.timeout_s is not None:
            branch.deadline = loop.time() + plan.timeout_s
        limit = None
        try:
            if plan.timeout_s is None:
                return await call(tries)
            async with asyncio.timeout(plan.timeout_s) as limit:
                return await call(tries)
        except asyncio.CancelledError as error:
            if self._branches.closed is not None:
                raise Unwind(self._branches.closed) from error
            raise
        except TimeoutError as error:
            if limit is None or not limit.expired():
                raise
            raise Transient(
                f"step {plan.name} took longer than {plan.timeout_s} s", code="timeout"
            ) from error
        finally:
            branch.is_in_step = False
            branch.deadline = None
            announce.cancel()

    async def _failed_try(
        self, plan: _Plan, error: Exception, tries: int, elapsed_s: float
    ) -> float:
        """Record a failed try; returns the delay before the next one or raises StepFailed."""
        verdict = classify(error)
        delay_s = backoff_s(
            plan.retry,
            tries=tries,
            verdict=verdict,
            elapsed_s=elapsed_s,
            wish_s=retry_after_s(error),
            random=random.random,
        )
        described = dump_error(error, plan.name)
        data: dict[str, Json] = {"name": plan.name, "tries": tries, "error": described}
        if delay_s is None:
            kind, state = "step.failed", "failed"
        else:
            kind, state = "step.retrying", "retrying"
            data["delay_s"] = round(delay_s, 3)
        await self._record(
            plan.key,
            plan.name,
            kind,
            data,
            state=state,
            error=orjson.dumps(described).decode(),
            tries=tries,
            duration_s=elapsed_s,
        )
        if delay_s is None:
            raise _failure(plan.name, described) from error
        return delay_s

    def _announce(self, plan: _Plan, tries: int) -> None:
        """Tell that a step is under way; nobody waits for this."""
        data = {"name": plan.name, "tries": tries}
        self._scope.committer.record(
            StepWrite(
                lease=self._lease,
                step_key=plan.key,
                name=plan.name,
                event_kind="step.started",
                event_data=orjson.dumps(data).decode(),
            )
        )

    async def _event(self, key: str, name: str, kind: str, data: Mapping[str, Json]) -> None:
        if self._branches.closed is not None:
            raise Unwind(self._branches.closed)
        await self._own(
            self._scope.committer.record(
                StepWrite(
                    lease=self._lease,
                    step_key=key,
                    name=name,
                    event_kind=kind,
                    event_data=dump(None, data),
                )
            )
        )

    async def _record(
        self,
        key: str,
        name: str,
        event_kind: str,
        data: Mapping[str, Json],
        *,
        kind: str = "step",
        state: str,
        output: str | None = None,
        error: str | None = None,
        tries: int = 1,
        duration_s: float = 0.0,
    ) -> None:
        """Store a step and its event durably before the flow goes on."""
        await self._own(
            self._scope.committer.record(
                StepWrite(
                    lease=self._lease,
                    step_key=key,
                    name=name,
                    kind=kind,
                    state=state,
                    output=output,
                    error=error,
                    tries=tries,
                    duration_s=duration_s,
                    event_kind=event_kind,
                    event_data=dump(None, data),
                )
            )
        )

    async def _persist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Make a write of its own, again while the database is out of reach."""
        for _ in range(100):
            try:
                await self._own(write())
            except Transient:
                await self._own(asyncio.sleep(0.3))
            else:
                return
        self._branches.close("lost")
        raise Unwind("lost")

    async def _own(self, awaitable: Awaitable[R]) -> R:
        """Await something of the engine's; an attempt ended meanwhile gets Unwind."""
        try:
            return await awaitable
        except LeaseLost as error:
            self._branches.close("lost")
            raise Unwind("lost") from error
        except asyncio.CancelledError as error:
            if self._branches.closed is not None:
                raise Unwind(self._branches.closed) from error
            raise


@dataclass(frozen=True, slots=True)
class _Plan:
    name: str
    key: str
    retry: Retry
    timeout_s: float | None
    output: TypeAdapter[Any] | None


def _adapter(declared: Any, function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    return output_of(function) if declared is None else TypeAdapter(declared)


def _failure(step: str, described: Mapping[str, Json]) -> StepFailed:
    kind = InputExpired if described.get("class") == "InputExpired" else StepFailed
    return kind(
        step,
        error_class=str(described.get("class", "")),
        code=str(described.get("code", "")),
        message=str(described.get("message", "")),
    )


def _replayed(name: str, recorded: Recorded, output: TypeAdapter[Any] | None) -> Any:
    if recorded.state == "failed":
        raise _failure(name, orjson.loads(recorded.error or "{}"))
    return load(output, recorded.output)


def _decision(
    name: str, recorded: Recorded, question: waits.Question, adapter: TypeAdapter[Any] | None
) -> Decision[Any]:
    if recorded.state == "failed":
        raise _failure(name, orjson.loads(recorded.error or "{}"))
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

