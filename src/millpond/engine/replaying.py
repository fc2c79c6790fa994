"""Replaying: flow code run against recorded history alone, executing and writing nothing.

Called by `endgame` to find what is to be undone, and by `checking` to compare code with history.
Invariant: a call whose end is not recorded parks its branch for good, so that the replay ends where the
history does; where the flow went on without that end, a time limit of its own had passed, and passes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from millpond.engine import once
from millpond.engine.attempt import Strand, read_input
from millpond.engine.branches import Branch, Unwind, forked_from
from millpond.engine.context import Context
from millpond.engine.history import History, Mismatch, Places, Recorded, unmet
from millpond.engine.leases import Claimed
from millpond.engine.opening import named
from millpond.engine.performing import Performer
from millpond.engine.plans import Plan
from millpond.engine.registry import Flow, Step
from millpond.engine.scope import Scope

R = TypeVar("R")
Outcome = Literal["open", "returned", "raised", "ended"]
# Flow code between its steps takes moments; what lasts longer does not come from the history.
LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Undo:
    """A step to perform with the recorded result of the step at `key`."""

    key: str
    step: Step[Any, Any]
    value: Any


@dataclass
class Findings:
    """What a replay met, by step key: what could be undone, and which `once` steps are in doubt.

    `unmet` are the recorded results that the code has not asked for yet, also those copied from another run,
    which this one need not come to: they have no place.
    """

    unmet: set[str]
    undos: dict[str, Undo] = field(default_factory=dict)
    doubts: dict[str, once.Doubt] = field(default_factory=dict)


class Replayer(Performer):
    """A performer that performs nothing: whoever asks it to waits, and the others go on."""

    def __init__(
        self,
        findings: Findings,
        places: Places,
        *args: Any,
        only_results: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.findings = findings
        self._places = places
        self._only_results = only_results
        self._branches.on_mixed = None  # nobody wakes what waits in a replay

    async def perform(
        self,
        branch: Branch,
        plan: Plan,
        call: Callable[[], Awaitable[Any]],
        recorded: Recorded | None,
    ) -> Any:
        """Note a step in doubt, and stop."""
        if recorded is not None and recorded.state in once.IN_DOUBT:
            self.findings.doubts[plan.key] = once.Doubt(
                step_key=plan.key,
                name=plan.name,
                tries=recorded.tries,
                role=plan.how.ask_role,
                output=plan.how.output,
            )
            self._met(plan.key)
        await self._stop(plan.key)

    def given(self, plan: Plan, recorded: Recorded, value: Any) -> None:
        """Note what was met, and what could be undone."""
        if plan.undo is not None:
            self.findings.undos[plan.key] = Undo(key=plan.key, step=plan.undo, value=value)
        self._met(plan.key)

    async def record(self, key: str, *_: Any, **__: Any) -> None:
        """Stop: this checkpoint is not recorded."""
        await self._stop(key)

    async def persist(self, write: Callable[[], Awaitable[Any]]) -> Any:
        """Stop: this wait is not recorded."""
        await self._stop("")

    async def own(self, awaitable: Awaitable[R]) -> R:
        """Stop: nothing is awaited."""
        if asyncio.iscoroutine(awaitable):
            awaitable.close()
        await self._stop("")

    async def tell(self, key: str, name: str, body: str) -> None:
        """Stop: no event is stored."""
        await self._stop(key)

    async def oblige(self) -> None:
        """Do nothing: what is obliged was so before."""

    def _met(self, key: str) -> None:
        """Count a result as met; a replay for the results alone is over with the last of them."""
        self.findings.unmet.discard(key)
        if self._only_results and not self.findings.unmet:
            self._branches.close("replayed")
            raise Unwind("replayed")

    async def _stop(self, key: str) -> NoReturn:
        branch = self._branches.here()
        if self._went_on(branch.path, len(branch.places)):
            raise TimeoutError("a time limit of the flow's own passed here")
        await self._branches.park(branch, key, is_human=False)
        raise AssertionError("a replay wakes nobody")

    def _went_on(self, path: str, place: int) -> bool:
        """Whether the flow is recorded to have gone on after the call that it makes here."""
        if self._places.goes_on(path, place):
            return True
        origin = forked_from(path)
        parent = None if origin is None else self._branches.at(origin[0])
        if origin is None or parent is None:
            return False
        return self._went_on(parent.path, parent.forked_at[origin[1]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """How a replay ended.

    `open` where the history ended before the code did, or they differ; `returned` or `raised` (with the
    `error`) where the code came to its end; `ended` when its end came from outside, for a `reason`.
    """

    outcome: Outcome
    error: Exception | None = None
    reason: str = ""


class Rehearsal:
    """One replay of a run's history by a flow; its `context` executes nothing and writes nothing.

    With `only_results` it is over when the code has asked for the last recorded result. `opens` gives it secrets;
    without, it gets their names.
    """

    def __init__(
        self,
        flow: Flow,
        claimed: Claimed,
        history: History,
        scope: Scope,
        *,
        only_results: bool = False,
        heeds_cancel: bool = True,
        opens: Callable[[str], Awaitable[str]] = named,
    ) -> None:
        self._flow = flow
        self._claimed = claimed
        self._history = history
        self.findings = Findings({key for key, one in history.items() if _is_result(key, one)})
        made = partial(Replayer, self.findings, Places(history), only_results=only_results)
        self.context = Context(
            claimed, history, scope, performer=made, heeds_cancel=heeds_cancel, opens=opens
        )

    @property
    def mismatch(self) -> Mismatch | None:
        """What of the history the code did not ask for as recorded, after the replay."""
        if self.context.mismatch is not None:
            return self.context.mismatch
        placed = {key for key in self.findings.unmet if self._history[key].seq is not None}
        key = min(placed, default=None)
        return None if key is None else unmet(key, self._history[key])

    async def replay(self) -> Replayed:
        """Run the flow code to the end of its history, for at most 10 s."""
        flow, context = self._flow, self.context
        limit = asyncio.get_running_loop().call_later(LIMIT_S, context.unwind, "timeout")
        try:
            value = read_input(flow, self._claimed.input)
            with Strand(context):
                await flow.function(context, value)
        except Unwind as unwind:
            is_open = unwind.reason in ("parked", "blocked", "replayed")
            return Replayed(outcome="open" if is_open else "ended", reason=unwind.reason)
        except Exception as error:  # noqa: BLE001 - whatever the flow raises is how its replay ended
            return Replayed(outcome="raised", error=error)
        finally:
            limit.cancel()
        return Replayed(outcome="returned")


def _is_result(key: str, recorded: Recorded) -> bool:
    """Whether a record is what a step of the flow's body came to, or the doubt about it."""
    is_over = recorded.state == "done" or recorded.state in once.IN_DOUBT
    return recorded.kind == "step" and is_over and not key.startswith("!")
