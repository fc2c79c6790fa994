"""StepContext: what a step's function gets as its first argument, wherever it executes.

Made by `context` for steps of its own run, by `step_tries` for steps of runs elsewhere, and by
`placing` in child processes. Invariant: the idempotency key is the same for every try in every place.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from millpond import veil
from millpond.engine.encoding import dump
from millpond.engine.metering import Spent
from millpond.errors import Permanent
from millpond.types import Json
from millpond.veil import Stream

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """Whose step this is; what a child process is told of it."""

    org_id: int
    run_id: uuid.UUID
    subject: str
    step_key: str
    try_number: int


@dataclass(frozen=True, slots=True)
class Teller:
    """How a step's progress is stored, as JSON text: with and without waiting for it; and how its text is shown.

    `tell_soon` gives the write, or None once nothing more is stored; `note_soon` hears, in whichever thread, that it is
    about to be asked, and what waits until all of that is stored.
    """

    tell: Callable[[str], Awaitable[None]]
    tell_soon: Callable[[str], asyncio.Future[None] | None]
    show: Callable[[str, veil.Veil | None], None]
    note_soon: Callable[[Callable[[], Awaitable[None]]], None] = lambda _: None


class StepContext:
    """What a registered step gets as its first argument."""

    def __init__(
        self,
        facts: StepFacts,
        *,
        resources: Mapping[type, object] | None = None,
        teller: Teller | None = None,
        opens: Callable[[str], Awaitable[str]] | None = None,
        spend: Callable[[Spent], None] | None = None,
    ) -> None:
        self._opens = opens
        self._veil = veil.current()
        self._facts = facts
        self._resources = resources
        self._teller = teller
        self._spend = spend
        self._loop = None if teller is None else asyncio.get_running_loop()
        self._untold: deque[str] = deque()
        self._telling: asyncio.Future[None] | None = None
        self.try_number = facts.try_number
        self.org_id = facts.org_id
        self.run_id = facts.run_id
        self.subject = facts.subject

    @property
    def idempotency_key(self) -> str:
        """The key to pass to whatever this step calls; the same for every try."""
        return f"{self.org_id}:{self.run_id}:{self._facts.step_key}"

    def get(self, kind: type[R]) -> R:
        """Return the worker's resource of a type; raises Permanent when it has none."""
        if self._resources is None:
            raise Permanent(
                "a step in a process of its own has none of the worker's resources",
                code="no_resource",
                advice="open what it needs in its function, or leave out runs_in='process'",
            )
        return resource(self._resources, kind)

    async def secret(self, name: str) -> str:
        """Open one of the org's secrets; from now on its value is hidden in all that this run leaves behind.

        Raises NotFound; Forbidden where the run may not act for its subject any more, and in every run that was
        started under a grant.
        """
        if self._opens is None:
            raise _no_secrets()
        return await self._opens(name)

    def secret_in_thread(self, name: str) -> str:
        """As `secret`, for functions that run in a thread; waits for the value.

        Raises Permanent also where it would block the worker: in the thread of its loop.
        """
        if self._loop is None:
            raise _no_secrets()
        if asyncio._get_running_loop() is self._loop:
            raise Permanent(
                "secret_in_thread was called in the worker's own thread, which must not wait",
                code="not_in_a_thread",
                advice="call `await step.secret(name)` in an async function",
            )
        return asyncio.run_coroutine_threadsafe(self.secret(name), self._loop).result()

    def veiled(self) -> Stream:
        """Return what hides the run's secrets in text that comes in pieces, such as a model's words.

        `feed` gives what may be shown of each piece by now, `end` the rest.
        """
        # One that has nothing to hide yet may get it later.
        return Stream(veil.Veil() if self._veil is None else self._veil)

    async def emit(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Store a progress event; a further try of the step may store it again."""
        await self._told().tell(self._body(name, data))

    def emit_soon(self, name: str, data: Mapping[str, Json] | None = None) -> None:
        """Store a progress event without waiting for it; for functions that run in a thread."""
        self._told().note_soon(self.told)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._tell_later, self._body(name, data))

    def delta(self, text: str) -> None:
        """Show text as it comes, such as a model's words, to whoever follows the run; from any thread.

        It is gathered for a tenth of a second, has the run's secrets hidden also across pieces, and is gone soon
        after the step is recorded: the whole belongs into the result. Not more than 256 KiB of a try are shown.
        """
        teller = self._told()
        if asyncio._get_running_loop() is self._loop:
            teller.show(text, self._veil)
        else:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(teller.show, text, self._veil)

    def spend(self, model: str, *, input_tokens: int, output_tokens: int) -> None:
        """Note what a call of a model used: it is counted as the org's usage with the record of this try.

        A try that fails after it is counted too, since the provider was really asked; a replay asks nobody. Raises
        InvalidInput, and Permanent in a process of its own.
        """
        self._note_spent(Spent(model, input_tokens, output_tokens))

    def spend_unknown(self, model: str) -> None:
        """Note that a call of a model was cut off before it told what it used.

        Limits on tokens then keep what the run had reserved; as usage nothing is counted. Raises as `spend`.
        """
        self._note_spent(Spent(model, 0, 0, is_cut=True))

    def _note_spent(self, spent: Spent) -> None:
        if self._spend is None:
            raise Permanent(
                "a step in a process of its own cannot tell what it used", code="no_spend"
            )
        spent.check()
        self._spend(spent)

    async def told(self) -> None:
        """Wait until everything is stored that was emitted so far; for the engine."""
        for _ in range(len(self._untold) + 1):  # somebody may emit more for ever
            if self._telling is not None:
                await asyncio.wait({self._telling})

    def _tell_later(self, text: str) -> None:
        self._untold.append(text)
        if self._telling is None:
            self._tell_next()

    def _tell_next(self, _: object = None) -> None:
        """Store one after the other, so that they keep their order."""
        self._telling = self._told().tell_soon(self._untold.popleft()) if self._untold else None
        if self._telling is not None:
            self._telling.add_done_callback(self._tell_next)

    def _body(self, name: str, data: Mapping[str, Json] | None) -> str:
        text = dump(None, {**(data or {}), "name": name})
        # A thread that the step began by itself has no veil of its own.
        return self._veil.json(text) if self._veil else text

    def _told(self) -> Teller:
        if self._teller is None:
            raise Permanent(
                "a step in a process of its own tells of nothing but its result", code="no_emit"
            )
        return self._teller


def _no_secrets() -> Permanent:
    return Permanent(
        "a step in a process of its own opens no secrets",
        code="no_secrets_here",
        advice="pass it what ctx.secret(name) gave as an argument, without another queue; or leave out "
        "runs_in='process'",
    )


def resource(resources: Mapping[type, object], kind: type[R]) -> R:
    """Return a worker's resource of a type; raises Permanent when it has none."""
    found = resources.get(kind)
    if not isinstance(found, kind):
        raise Permanent(f"this worker has no {kind.__name__}", code="no_resource")
    return found
