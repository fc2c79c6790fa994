"""The sync client, and runs as it hands them out.

Called by users' code. Invariants: every call goes through `send`, which alone repeats; a client may be
shared by threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx2

from millpond.client import calls
from millpond.client.calls import Call, Id
from millpond.client.errors import ApiError, RunCancelled, RunFailed, Unavailable, WaitTimeout
from millpond.client.following import Following
from millpond.client.models import Event, Page, RunData
from millpond.client.sending import (
    Patience,
    headers_of,
    may_repeat,
    refused,
    request_of,
    result_of,
    unreachable,
)
from millpond.client.surface import method

P = ParamSpec("P")
T = TypeVar("T")
_STREAM_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)


class Client:
    """One server, one token; use it as a context manager or `close` it."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        patience: Patience | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(
            base_url=url,
            headers=headers_of(token),
            timeout=httpx2.Timeout(timeout_s, connect=10.0),
            transport=transport,
        )
        self._patience = patience or Patience()
        self.runs = Runs(self)
        self.inputs = Inputs(self)
        self.flows = Flows(self)
        self.queues = Queues(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Do a call, again while that is safe and worth it; raises ApiError."""
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return result_of(call, self._request(call))
            except ApiError as error:
                elapsed_s = time.monotonic() - began
                delay_s = self._patience.delay_s(error, tries=tries, elapsed_s=elapsed_s)
                if delay_s is None or not may_repeat(call, error):
                    raise
            time.sleep(delay_s)

    def _request(self, call: Call[Any]) -> httpx2.Response:
        try:
            return self._http.request(**request_of(call))
        except httpx2.TransportError as error:
            raise unreachable(error, self._http.base_url) from error

    def follow(self, run_id: Id, *, after: int = 0) -> Iterator[Event]:
        """Yield a run's events above a number, then live ones, to the final one.

        A stream that breaks is opened again from the last event; raises Unavailable when the server
        stays away for a minute.
        """
        following = Following(after=after)
        while True:
            broken: ApiError | None = None
            try:
                with self._http.sse(
                    f"/v1/runs/{run_id}/events",
                    headers=following.headers,
                    timeout=_STREAM_TIMEOUT,
                    max_event_size=None,
                ) as source:
                    if source.response.is_error:
                        source.response.read()
                        raise refused(source.response)
                    if source.response.status_code == httpx2.codes.NO_CONTENT:
                        return
                    for message in source:
                        event = following.take(message)
                        if event is not None:
                            yield event
                            if event.is_final:
                                return
            except httpx2.TransportError as error:
                broken = unreachable(error, self._http.base_url)
            except Unavailable as error:
                broken = error
            pause_s = following.next_pause_s()
            if pause_s is None:
                raise broken or Unavailable(f"the events of run {run_id} ended early")
            time.sleep(pause_s)


class Group:
    """Calls of one kind of thing."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def send(self, call: Call[T]) -> T:
        """Do a call."""
        return self._client.send(call)

    def give(self, call: Call[RunData]) -> Run:
        """Do a call that tells of a run."""
        return Run(self._client, self._client.send(call))

    def _pages(self, call: Call[Page[T]]) -> Iterator[T]:
        """Yield every item of a list, page after page."""
        while True:
            page = self.send(call)
            yield from page.data
            if not page.has_more:
                return
            call = calls.next_page(call, page)


class Run:
    """A run and what can be done with it; `data` is as the server told of it last."""

    def __init__(self, client: Client, data: RunData) -> None:
        self._client = client
        self.data = data

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.data.flow} {self.state}>"

    @property
    def id(self) -> Any:
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

    def refresh(self) -> Self:
        """Ask for the run as it stands now."""
        self.data = self._client.send(calls.get_run(self.id))
        return self

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """Yield stored events above a number, then live ones, to the final one."""
        return self._client.follow(self.id, after=after)

    def wait(self, timeout_s: float | None = None) -> Self:
        """Wait until the run has ended, whichever way; raises WaitTimeout, and the run goes on."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = 0.05
        while not self.refresh().data.is_final:
            if give_up is not None and time.monotonic() + pause_s > give_up:
                raise WaitTimeout(f"run {self.id} is {self.state} after {timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 1.0)
        return self

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait and return the output; raises RunFailed or RunCancelled when there is none."""
        self.wait(timeout_s)
        if self.state == "failed":
            raise RunFailed(self.data)
        if self.state == "cancelled":
            raise RunCancelled(self.data)
        return self.output

    def cancel(self, reason: str = "") -> Self:
        """Ask to stop the run."""
        self.data = self._client.send(calls.cancel_run(self.id, reason=reason))
        return self


class run_method(Generic[P]):  # noqa: N801 - reads as a decorator does
    """A method whose call tells of a run: it gives a Run to go on with."""

    def __init__(self, build: Callable[P, Call[RunData]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group, owner: type) -> Callable[P, Run]: ...

    def __get__(self, group: Group | None, owner: type) -> Any:
        if group is None:
            return self

        def do(*args: P.args, **kwargs: P.kwargs) -> Run:
            return group.give(self._build(*args, **kwargs))

        do.__doc__ = self.__doc__
        return do


class Runs(Group):
    """Runs: start, find, stop, repeat."""

    start = run_method(calls.start_run)
    get = run_method(calls.get_run)
    cancel = run_method(calls.cancel_run)
    page = method(calls.list_runs)
    event_page = method(calls.list_events)

    def list(self, **wanted: Any) -> Iterator[RunData]:
        """Yield all runs that match, newest first; takes what `page` takes."""
        return self._pages(calls.list_runs(**wanted))


class Inputs(Group):
    """Questions to humans."""

    page = method(calls.list_input_requests)
    get = method(calls.get_input_request)
    resolve = method(calls.resolve_input_request)


class Flows(Group):
    """Flows as workers published them."""

    list = method(calls.list_flows)
    get = method(calls.get_flow)


class Queues(Group):
    """Queues as the caller's org sees them."""

    list = method(calls.list_queues)
