"""Runs as the clients hand them out: `Run` and `AsyncRun`, and the methods that give them.

Made by the clients, used by users' code. Invariant: what both can do is declared once, in `Handle`; only
what waits is written twice.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from millpond.client.call import Call, Id
from millpond.client.calls import runs
from millpond.client.errors import RunCancelled, RunFailed, WaitTimeout
from millpond.client.models import Delta, Event, RunData
from millpond.client.surface import Group, Kind, Later, Made, Now, Sends

P = ParamSpec("P")
T = TypeVar("T")
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class run_method(Made, Generic[P]):  # noqa: N801 - reads as a decorator does
    """A method whose call tells of a run: it gives a handle to go on with."""

    def __init__(self, build: Callable[P, Call[RunData]]) -> None:
        super().__init__(build)

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group[Now], owner: type) -> Callable[P, Run]: ...

    @overload
    def __get__(
        self, group: Group[Later], owner: type
    ) -> Callable[P, Coroutine[Any, Any, AsyncRun]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        return super().__get__(group, owner)

    def do(self, group: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the call and give the handle of the run that it tells of."""
        return group._client.handle(self.build(*args, **kwargs))


class own_method(Made, Generic[P, T]):  # noqa: N801 - reads as a decorator does
    """A method of a run that does a call about it."""

    def __init__(self, build: Callable[Concatenate[Id, P], Call[T]]) -> None:
        super().__init__(build)

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group[Now], owner: type) -> Callable[P, T]: ...

    @overload
    def __get__(self, group: Group[Later], owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        return super().__get__(group, owner)

    def do(self, group: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the call about the run."""
        return group._client.send(self.build(group.id, *args, **kwargs))


class own_run_method(Made, Generic[P]):  # noqa: N801 - reads as a decorator does
    """A method of a run whose call tells of another run that follows from it."""

    def __init__(self, build: Callable[Concatenate[Id, P], Call[RunData]]) -> None:
        super().__init__(build)

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group[Now], owner: type) -> Callable[P, Run]: ...

    @overload
    def __get__(
        self, group: Group[Later], owner: type
    ) -> Callable[P, Coroutine[Any, Any, AsyncRun]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        return super().__get__(group, owner)

    def do(self, group: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the call about the run and give the handle of the other one."""
        return group._client.handle(self.build(group.id, *args, **kwargs))


class Handle(Group[Kind]):
    """A run and what can be done with it; `data` is as the server told of it last."""

    def __init__(self, client: Sends, data: RunData) -> None:
        super().__init__(client)
        self.data = data

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.data.flow} {self.state}>"

    @property
    def id(self) -> uuid.UUID:
        """The run's id."""
        return self.data.id

    @property
    def state(self) -> str:
        """The state as it was told last; `refresh` asks again."""
        return self.data.state

    @property
    def output(self) -> Any:
        """The flow's result as it was told last."""
        return self.data.output

    why = own_method(runs.explain_run)
    signal = own_method(runs.signal_run)
    rerun = own_run_method(runs.rerun_run)
    release = own_run_method(runs.release_run)


class Run(Handle[Now]):
    """A run, as the sync client hands it out."""

    def refresh(self) -> Self:
        """Ask for the run as it stands now."""
        return self._tell(runs.get_run(self.id))

    def cancel(self, reason: str = "", *, skip_endings: bool = False) -> Self:
        """Ask to stop the run; with `skip_endings` nothing is undone."""
        return self._tell(runs.cancel_run(self.id, reason, skip_endings=skip_endings))

    def resume(self) -> Self:
        """Queue a blocked run again."""
        return self._tell(runs.resume_run(self.id))

    def _tell(self, call: Call[RunData]) -> Self:
        self.data = self._client.send(call)
        return self

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """Yield stored events above a number, then live ones, to the final one."""
        events: Iterator[Event] = self._client.follow(self.id, after=after)
        return events

    def watch(self, *, after: int = 0) -> Iterator[Event | Delta]:
        """As `events`, with the text that steps show while they go on, such as a model's words."""
        told: Iterator[Event | Delta] = self._client.watch(self.id, after=after)
        return told

    def wait(self, timeout_s: float | None = None) -> Self:
        """Wait until the run has ended, whichever way; raises WaitTimeout, and the run goes on."""
        waiting = _Waiting(timeout_s)
        while not self.refresh().data.is_final:
            time.sleep(waiting.next_pause_s(self.data))
        return self

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait and return the output; raises RunFailed or RunCancelled when there is none."""
        return _output(self.wait(timeout_s).data)


class AsyncRun(Handle[Later]):
    """A run, as the async client hands it out."""

    async def refresh(self) -> Self:
        """Ask for the run as it stands now."""
        return await self._tell(runs.get_run(self.id))

    async def cancel(self, reason: str = "", *, skip_endings: bool = False) -> Self:
        """Ask to stop the run; with `skip_endings` nothing is undone."""
        return await self._tell(runs.cancel_run(self.id, reason, skip_endings=skip_endings))

    async def resume(self) -> Self:
        """Queue a blocked run again."""
        return await self._tell(runs.resume_run(self.id))

    async def _tell(self, call: Call[RunData]) -> Self:
        self.data = await self._client.send(call)
        return self

    def events(self, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """Yield stored events above a number, then live ones, to the final one."""
        events: AsyncGenerator[Event, None] = self._client.follow(self.id, after=after)
        return events

    def watch(self, *, after: int = 0) -> AsyncGenerator[Event | Delta, None]:
        """As `events`, with the text that steps show while they go on, such as a model's words."""
        told: AsyncGenerator[Event | Delta, None] = self._client.watch(self.id, after=after)
        return told

    async def wait(self, timeout_s: float | None = None) -> Self:
        """Wait until the run has ended, whichever way; raises WaitTimeout, and the run goes on."""
        waiting = _Waiting(timeout_s)
        while not (await self.refresh()).data.is_final:
            await asyncio.sleep(waiting.next_pause_s(self.data))
        return self

    async def result(self, timeout_s: float | None = None) -> Any:
        """Wait and return the output; raises RunFailed or RunCancelled when there is none."""
        return _output((await self.wait(timeout_s)).data)


class _Waiting:
    """How long to pause between looks at a run, and when to give up."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self.give_up = None if timeout_s is None else time.monotonic() + timeout_s
        self.pause_s = _FIRST_PAUSE_S

    def next_pause_s(self, run: RunData) -> float:
        pause_s = self.pause_s
        if self.give_up is not None and time.monotonic() + pause_s > self.give_up:
            raise WaitTimeout(f"run {run.id} is {run.state} after {self.timeout_s} s")
        self.pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
        return pause_s


def _output(run: RunData) -> Any:
    if run.state == "failed":
        raise RunFailed(run)
    if run.state == "cancelled":
        raise RunCancelled(run)
    return run.output
