"""Plans: how one step is to be performed, and what its recorded outcome means to the flow. Pure.

Made by `context` and `replaying`, followed by `performing`. Invariant: a recorded failure is raised again as the
exception that it was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from millpond.engine.deltas import Growing
from millpond.engine.encoding import read_back
from millpond.engine.history import Recorded
from millpond.engine.manners import Manner
from millpond.engine.metering import Spent
from millpond.engine.registry import Step
from millpond.engine.tokens import carried
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
    """One step of a run that is to be performed, and `how`; `current_try` is 0 while none is running.

    `undo` is performed with its result if the run fails. `text` is what the current try has shown while it goes on.
    It `is_seated` while a row holds its room on the keys that it needs. `told` waits for events that are on their way.
    """

    name: str
    key: str
    how: Manner
    undo: Step[Any, Any] | None = None
    current_try: int = 0
    spent: list[Spent] | None = None
    text: Growing | None = None
    is_seated: bool = False
    told: Callable[[], Awaitable[None]] | None = None

    def note_soon(self, told: Callable[[], Awaitable[None]]) -> None:
        """Note what waits for events that are on their way."""
        self.told = told

    def spend(self, spent: Spent) -> None:
        """Note what a try used; it is stored with the record of that try."""
        if self.spent is None:
            self.spent = []
        if keys := self.how.keys:
            spent = replace(spent, step_key=self.key, carried=carried(keys))
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
        return None if recorded.output is None else read_back(self.how.output, recorded.output)


def failure(step: str, described: Mapping[str, Json]) -> StepFailed:
    """Make the exception of a recorded failure."""
    kind = InputExpired if described.get("class") == "InputExpired" else StepFailed
    return kind(
        step,
        error_class=str(described.get("class", "")),
        code=str(described.get("code", "")),
        message=str(described.get("message", "")),
    )
