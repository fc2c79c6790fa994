"""The async client.

Called by users' code. Invariants: every call goes through `send`, which alone repeats; a client
belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from millpond.client.call import Call, Id, next_page, path_of
from millpond.client.calls.runs import list_org_events
from millpond.client.errors import ApiError, Unauthenticated, Unavailable
from millpond.client.following import Following, FollowingAll
from millpond.client.groups import Groups
from millpond.client.handles import AsyncRun
from millpond.client.models import Delta, Event, OrgEvent, Page, RunData
from millpond.client.renewing import OnRenewed, Tokens
from millpond.client.sending import (
    Patience,
    headers_of,
    may_repeat,
    refused,
    request_of,
    result_of,
    unreachable,
)
from millpond.client.surface import Later

T = TypeVar("T")
_STREAM_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)


class AsyncClient(Groups[Later]):
    """One server, one token; use it as a context manager or `close` it.

    `organization` (id or slug) is needed by tokens that span several, and by those of outside issuers.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        token: str | None = None,
        organization: str | None = None,
        refresh_token: str | None = None,
        on_renewed: OnRenewed | None = None,
        timeout_s: float = 30.0,
        patience: Patience | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers_of(token, organization),
            timeout=httpx2.Timeout(timeout_s, connect=10.0),
            transport=transport,
        )
        self._tokens = Tokens(token, refresh_token, on_renewed)
        self._renewing = asyncio.Lock()
        self._patience = patience or Patience()
        self._open(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Do a call, again while that is safe and worth it; raises ApiError."""
        began, tries, may_renew = time.monotonic(), 0, True
        while True:
            tries += 1
            used = self._tokens.access
            try:
                return result_of(call, await self._request(call))
            except ApiError as error:
                if may_renew and await self._renew(error, used):
                    may_renew = False
                    continue
                elapsed_s = time.monotonic() - began
                delay_s = self._patience.delay_s(error, tries=tries, elapsed_s=elapsed_s)
                if delay_s is None or not may_repeat(call, error):
                    raise
            await asyncio.sleep(delay_s)

    async def _renew(self, error: ApiError, used: str | None) -> bool:
        """Trade the refresh token for new tokens when that is what an error asks for; False when not."""
        if not self._tokens.is_too_old(error):
            return False
        async with self._renewing:
            if self._tokens.access == used:
                if not self._tokens.can_renew:
                    return False
                call = self._tokens.call()
                self._tokens.take(call.read(await self._checked(call)))
                self._http.headers["Authorization"] = f"Bearer {self._tokens.access}"
        return True

    async def _checked(self, call: Call[Any]) -> Any:
        response = await self._request(call)
        if response.is_error:
            raise refused(response)
        return response.json()

    async def _request(self, call: Call[Any]) -> httpx2.Response:
        try:
            return await self._http.request(**request_of(call))
        except httpx2.TransportError as error:
            raise unreachable(error, self._http.base_url) from error

    async def handle(self, call: Call[RunData]) -> AsyncRun:
        """Do a call that tells of a run, and give a handle of that run."""
        return AsyncRun(self, await self.send(call))

    async def pages(self, call: Call[Page[T]]) -> AsyncIterator[T]:
        """Yield every item of a list, page after page."""
        while True:
            page = await self.send(call)
            for item in page.data:
                yield item
            if not page.has_more:
                return
            call = next_page(call, page)

    async def follow(self, run_id: Id, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """Yield a run's events above a number, then live ones, to the final one.

        A stream that breaks is opened again from the last event; raises Unavailable when the server
        stays away for a minute.
        """
        async with aclosing(self.watch(run_id, after=after)) as watched:
            async for told in watched:
                if isinstance(told, Event):
                    yield told

    async def watch(self, run_id: Id, *, after: int = 0) -> AsyncGenerator[Event | Delta, None]:
        """As `follow`, with the text that steps show while they go on between the events."""
        following = Following(after=after)
        while True:
            used = self._tokens.access
            broken: ApiError | None = None
            try:
                async with self._http.sse(
                    path_of("runs", run_id, "events"),
                    headers=following.headers,
                    timeout=_STREAM_TIMEOUT,
                    max_event_size=None,
                ) as source:
                    if source.response.is_error:
                        await source.response.aread()
                        raise refused(source.response)
                    if source.response.status_code == httpx2.codes.NO_CONTENT:
                        return
                    async for message in source:
                        told = following.take(message)
                        if told is not None:
                            yield told
                        if isinstance(told, Event) and told.is_final:
                            return
            except httpx2.TransportError as error:
                broken = unreachable(error, self._http.base_url)
            except Unavailable as error:
                broken = error
            except Unauthenticated as error:
                if not following.may_renew or not await self._renew(error, used):
                    raise
                following.may_renew = False
                continue
            pause_s = following.next_pause_s()
            if pause_s is None:
                raise broken or Unavailable(f"the events of run {run_id} ended early")
            await asyncio.sleep(pause_s)

    async def follow_all(
        self,
        *,
        after: str = "now",
        kind: str | Sequence[str] | None = None,
        flow: str | None = None,
    ) -> AsyncGenerator[OrgEvent, None]:
        """Yield events of all runs of the org after a place, then live ones, for ever.

        The place is an event's `id`; `now` stands after all that is over, an empty one before. A stream that breaks is
        opened again from the last event; raises Unavailable when the server stays away for a minute.
        """
        if after == "now":  # a place of its own, so that a stream that breaks early goes on there
            page = await self.send(list_org_events(after="now", kind=kind, flow=flow))
            for event in page.data:  # between the question and the answer
                yield event
            after = str(page.last_id)
        following = FollowingAll(after=after, kind=kind, flow=flow)
        while True:
            used = self._tokens.access
            broken: ApiError | None = None
            try:
                async with self._http.sse(
                    path_of("run-events"),
                    params=following.params,
                    headers=following.headers,
                    timeout=_STREAM_TIMEOUT,
                    max_event_size=None,
                ) as source:
                    if source.response.is_error:
                        await source.response.aread()
                        raise refused(source.response)
                    async for message in source:
                        told = following.take(message)
                        if told is not None:
                            yield told
            except httpx2.TransportError as error:
                broken = unreachable(error, self._http.base_url)
            except Unavailable as error:
                broken = error
            except Unauthenticated as error:
                if not following.may_renew or not await self._renew(error, used):
                    raise
                following.may_renew = False
                continue
            pause_s = following.next_pause_s()
            if pause_s is None:
                raise broken or Unavailable("the events of the organization ended early")
            await asyncio.sleep(pause_s)
