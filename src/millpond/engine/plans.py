"""Plans: how one step is to be performed, and what its recorded outcome means to the flow. Pure.

Made by `context` and `replaying`, followed by `performing`. Invariant: a recorded failure is raised again as the
exception that it was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from pydantic import TypeAdapter

from millpond.engine.deltas import Growing
from millpond.engine.encoding import read_back
from millpond.engine.history import Recorded
from millpond.engine.metering import Spent
from millpond.engine.registry import ASK_ROLE, Step
from millpond.engine.tokens import carried
from millpond.retry import Retry
from millpond.types import Json


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


@dataclass(slots=True, eq=False)
class Plan:
    """How one step is to be performed; `current_try` is 0 while none is running.

    `is_once` forbids to repeat its effect; `undo` is performed with its result if the run fails. One that `acts`
    needs the run's rights, and `permission` too. `text` is what the current try has shown while it goes on. `keys` are
    what a try counts on beside its run, the step's own (`is_declared`) or given where it is called; `is_seated` while
    a row holds its room there. `told` waits for events that are on their way.
    """

    name: str
    key: str
    retry: Retry
    timeout_s: float | None
    output: TypeAdapter[Any] | None
    is_once: bool = False
    ask_role: str = ASK_ROLE
    undo: Step[Any, Any] | None = None
    acts: bool = True
    permission: str | None = None
    current_try: int = 0
    spent: list[Spent] | None = None
    text: Growing | None = None
    keys: tuple[str, ...] = ()
    is_declared: bool = False
    is_seated: bool = False
    told: Callable[[], Awaitable[None]] | None = None

    @property
    def declared(self) -> tuple[str, ...]:
        """The keys that the step itself declares: those given where it is called may come from anybody's input."""
        return self.keys if self.is_declared else ()

    def note_soon(self, told: Callable[[], Awaitable[None]]) -> None:
        """Note what waits for events that are on their way."""
        self.told = told

    def spend(self, spent: Spent) -> None:
        """Note what a try used; it is stored with the record of that try."""
        if self.spent is None:
            self.spent = []
        if self.keys:
            spent = replace(spent, step_key=self.key, carried=carried(self.keys))
        self.spent.append(spent)

    def take_spent(self) -> Sequence[Spent]:
        """Return what was used since the last record."""
        if self.spent is None:
            return ()
        spent, self.spent = self.spent, None
        return spent

    def keep_spent(self, spent: Sequence[Spent]) -> None:
        """Keep what a record that was refused would have told; the next one tells it."""
        if spent:
            self.spent = [*spent, *(self.spent or ())]

    def result_of(self, recorded: Recorded) -> Any:
        """Return the result of a step that is over; raises StepFailed where it failed."""
        if recorded.state == "failed":
            raise failure(self.name, orjson.loads(recorded.error or "{}"))
        return None if recorded.output is None else read_back(self.output, recorded.output)


def failure(step: str, described: Mapping[str, Json]) -> StepFailed:
    """Make the exception of a recorded failure."""
    kind = InputExpired if described.get("class") == "InputExpired" else StepFailed
    return kind(
        step,
        error_class=str(described.get("class", "")),
        code=str(described.get("code", "")),
        message=str(described.get("message", "")),
    )
