"""Follows many runs at once, live: keeps their events, shows each as it comes, waits for conditions.

Called by `play`. Invariant: events of a run are kept in order and complete, since each run is
followed by its own resuming stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from types import TracebackType

from millpond.cli.remote import Remote
from millpond.errors import Unavailable
from millpond.types import Json

Show = Callable[[str, Json], None]


class Watch:
    """Streams of several runs; `events` maps each run's id to what it has told so far."""

    def __init__(self, remote: Remote, show: Show) -> None:
        self._remote = remote
        self._show = show
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self.events: dict[str, list[Json]] = {}

    async def __aenter__(self) -> Watch:
        """Begin; runs are added by `add`."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def add(self, run_id: str, label: str) -> None:
        """Follow one more run, shown under `label`."""
        self.events[run_id] = []
        task = asyncio.create_task(self._follow(run_id, label), name=f"follow {label}")
        self._tasks.append(task)

    async def until(self, what: str, is_so: Callable[[], bool], *, timeout_s: float) -> None:
        """Return as soon as `is_so`; raises Unavailable naming `what` when the time is over."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while not is_so():
                    self._raise_broken()
                    await self._changed.wait()
        except TimeoutError as error:
            raise Unavailable(f"{what} did not happen within {timeout_s:.0f} s") from error

    def has(self, run_id: str, kind: str, name: str | None = None) -> bool:
        """Whether a run has told an event of `kind`, about the step `name` if that is given."""
        return any(
            event["kind"] == kind and name in (None, event["data"].get("name"))
            for event in self.events[run_id]
        )

    def stands_at(self, run_id: str, *kinds: str) -> bool:
        """Whether the last word about the run as a whole is one of `kinds`."""
        words = [event["kind"] for event in self.events[run_id] if event["kind"][:4] == "run."]
        return bool(words) and words[-1] in kinds

    async def _follow(self, run_id: str, label: str) -> None:
        try:
            async with aclosing(self._remote.follow(run_id)) as events:
                async for event in events:
                    self._show(label, event)
                    async with self._changed:
                        self.events[run_id].append(event)
                        self._changed.notify_all()
        finally:
            async with self._changed:
                self._changed.notify_all()

    def _raise_broken(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
