"""Calling: the functions of an attempt's steps, called where they execute, or sent to another worker.

Called by `context`, one Caller per attempt. Invariant: where a step executes changes neither its key nor
what it is told of itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from millpond.engine.arguments import arguments_of
from millpond.engine.branches import Branches
from millpond.engine.encoding import output_of
from millpond.engine.leases import Claimed
from millpond.engine.manners import Manner
from millpond.engine.opening import Opening
from millpond.engine.performing import Performer
from millpond.engine.plans import Plan
from millpond.engine.registry import Step, keys_of_step, meets, once_elsewhere
from millpond.engine.remote import Sent, send
from millpond.engine.scope import Scope
from millpond.engine.step_context import StepContext, StepFacts, Teller
from millpond.engine.tokens import ABOVE_LIMIT
from millpond.errors import InvalidInput
from millpond.retry import DEFAULT_RETRY

_ORDINARY = Manner(DEFAULT_RETRY)


class Caller:
    """Calls and sends the steps of one attempt."""

    def __init__(
        self,
        claimed: Claimed,
        scope: Scope,
        performer: Performer,
        branches: Branches,
        opens: Callable[[str], Awaitable[str]] | None,
    ) -> None:
        self._opens = opens
        self._claimed = claimed
        self._lease = claimed.lease
        self._subject = claimed.subject
        self._queue = claimed.queue
        self._scope = scope
        self._performer = performer
        self._branches = branches

    async def open(self, name: str) -> str:
        """Return a secret's value; raises as `Opening.open`."""
        if self._opens is None:
            self._opens = Opening(self._claimed, self._scope, self._performer).open
        return await self._opens(name)

    def elsewhere(self, step: Step[..., Any], queue: str | None) -> str | None:
        """Return the queue in which others execute a step; None when this attempt does it itself."""
        wanted = queue or step.queue or self._queue
        if wanted == self._queue and meets(self._scope.labels, step.needs):
            return None
        if step.effect == "once":
            raise once_elsewhere(step.name, "queue")
        return wanted

    async def send(
        self,
        step: Step[..., Any],
        plan: Plan,
        queue: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Let another worker execute a step; raises InvalidInput for arguments that are no JSON.

        One that needs more tokens than there ever are fails: raises StepFailed.
        """
        sent = Sent(
            step_key=plan.key,
            name=step.name,
            queue=queue,
            capability=step.capability,
            seq=self._branches.place(plan.key),
            keys=step.keys,
            arguments=arguments_of(step.name, step.function).written(args, kwargs),
        )
        try:
            await self._performer.persist(lambda: send(self._scope.database, self._lease, sent))
        except InvalidInput as error:
            if error.code != ABOVE_LIMIT:
                raise
            await self._performer.refuse(plan, error)
        self._scope.hints.wake([queue])
        self._scope.hints.changed([self._lease.run_id])

    def call(
        self,
        step: Step[..., Any],
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Awaitable[Any]:
        """Call a registered step's function where it executes, for the current try."""
        try_number = plan.current_try
        facts = StepFacts(
            org_id=self._lease.org_id,
            run_id=self._lease.run_id,
            subject=self._subject,
            step_key=plan.key,
            try_number=try_number,
        )
        if step.place == "process":
            return self._scope.placing.call_apart(step.function, facts, args, kwargs)
        performer, key, name = self._performer, plan.key, step.name
        teller = Teller(
            lambda body: performer.tell(key, name, body),
            lambda body: performer.tell_soon(key, name, body),
            lambda text, veil: performer.show(plan, try_number, text, veil),
            plan.note_soon,
        )
        first = StepContext(
            facts,
            resources=self._scope.resources,
            teller=teller,
            opens=self.open,
            spend=plan.spend,
        )
        if step.place == "loop":
            return step.function(first, *args, **kwargs)
        return self._scope.placing.call_step(step, first, args, kwargs, keeps=self._keeps)

    def call_plain(self, function: Callable[..., Any], args: Sequence[Any]) -> Awaitable[Any]:
        """Call a step's plain function that is not registered, in a thread."""
        return self._scope.placing.call(function, tuple(args), {}, keeps=self._keeps)

    def _keeps(self) -> bool:
        """Whether the result of a thread counts that returned when its attempt was being ended."""
        return self._branches.closed is not None


def refuse_queue(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidInput where a queue is named for a step that is not registered; it executes here alone."""
    if "queue" in kwargs:
        raise InvalidInput(
            f"step {name} cannot execute in another queue: only registered steps can",
            param="queue",
            code="step_not_registered",
            advice="register its function with @step",
        )


def unregistered_manner(
    name: str, function: Callable[..., Any], kwargs: Mapping[str, Any]
) -> Manner:
    """Return how a step is to be performed that is not registered, as its call says: mostly that says nothing."""
    declared = kwargs.get("output")
    output = output_of(function) if declared is None else TypeAdapter(declared)
    if not kwargs:
        return _ORDINARY if output is None else Manner(DEFAULT_RETRY, output=output)
    return Manner(
        kwargs.get("retry", DEFAULT_RETRY),
        kwargs.get("timeout_s"),
        output,
        keys=keys_of_step(name, kwargs.get("keys", ()), kwargs.get("tokens")),
    )
