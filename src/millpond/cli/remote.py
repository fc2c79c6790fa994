"""The HTTP side of the command line: calls the API, follows event streams, reads problem documents.

Called by every command that talks to a server, and by the demo. Invariants: every refusal becomes an
error of Millpond's tree; the development token is sent to this machine only; following a run loses
no event and shows none twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from millpond.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    MillpondError,
    NotFound,
    OverQuota,
    Permanent,
    Transient,
    Unauthenticated,
    Unavailable,
)
from millpond.types import FINAL_STATES, Json

FINAL_KINDS = frozenset(f"run.{state}" for state in FINAL_STATES)
DEV_FILE = "token"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PATIENCE_S = 30.0
_FEED = "/v1/run-events"
_SIGN_IN = "Sign in with `millpond login`, or set MILLPOND_TOKEN or --token."
# Where the server's own advice speaks of HTTP.
_ADVICE = {
    "org_needed": "Say which: `millpond --org NAME …` or MILLPOND_ORG; `millpond org use NAME` keeps it.",
    "org_forbidden": "`millpond whoami` shows yours; `millpond org use NAME` chooses another.",
    "session_needed": _SIGN_IN,
}
# Their own advice holds; with any other 401 the token is at fault.
_NOT_BY_TOKEN = frozenset({"sign_in_refused", "refresh_invalid"})
_CLASSES: dict[int, type[MillpondError]] = {
    400: InvalidInput,
    401: Unauthenticated,
    402: OverQuota,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Conflict,
    413: InvalidInput,
    415: InvalidInput,
    422: InvalidInput,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


class Remote:
    """One server and one token."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        token: str | None,
        *,
        auth: httpx2.Auth | None = None,
        org: str | None = None,
    ) -> AsyncIterator[Remote]:
        """Open a client for the server at `url`, with a token or what finds one; no call is made yet.

        `org` names the org of every request, by id or slug.
        """
        headers = {"Accept": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if org:
            headers["X-Organization-Id"] = org
        try:
            client = httpx2.AsyncClient(
                base_url=url,
                headers=headers,
                auth=auth,
                timeout=httpx2.Timeout(30.0, connect=5.0),
                trust_env=not is_this_machine(url),
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise InvalidInput(f"{url!r} is not an address: {error}", param="--url") from error
        async with client:
            yield cls(client)

    async def get(self, path: str, params: Mapping[str, Any] | None = None) -> Json:
        """GET `path` and return its JSON; parameters that are None are left out."""
        return _json(await self._request("GET", path, params=_given(params or {})))

    async def post(
        self,
        path: str,
        document: Json = None,
        *,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        """POST a JSON document, or raw `content`, and return the JSON that comes back."""
        return _json(await self.post_raw(path, document, content, params, headers))

    async def download(
        self, path: str, params: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """GET `path` and yield the bytes that come, as they come."""
        try:
            async with self._client.stream("GET", path, params=_given(params or {})) as response:
                if response.is_error:
                    await response.aread()
                    raise problem(response)
                async for part in response.aiter_bytes():
                    yield part
        except httpx2.TransportError as error:
            raise away(self._client.base_url, error) from error

    async def patch(self, path: str, document: Json) -> Json:
        """PATCH `path` with a JSON document and return the JSON that comes back."""
        return _json(await self._request("PATCH", path, json=document))

    async def put(self, path: str, document: Json) -> Json:
        """PUT a JSON document and return the JSON that comes back."""
        return _json(await self._request("PUT", path, json=document))

    async def delete(self, path: str) -> None:
        """DELETE `path`."""
        await self._request("DELETE", path)

    async def post_raw(
        self,
        path: str,
        document: Json = None,
        content: bytes | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """POST like `post`, and return the whole response: the demo shows its status and headers."""
        body: dict[str, Any] = {"content": content} if content is not None else {"json": document}
        return await self._request(
            "POST", path, params=_given(params or {}), headers=dict(headers or {}), **body
        )

    async def follow(self, run_id: str, after: int = 0) -> AsyncGenerator[Json, None]:
        """Yield the events of a run after number `after`, live, until its final one.

        A broken stream is opened again from the last event seen; raises Unavailable when the server
        stays away for 30 s.
        """
        async with aclosing(self.watch(run_id, after)) as told:
            async for one in told:
                if "kind" in one:
                    yield one

    async def watch(self, run_id: str, after: int = 0) -> AsyncGenerator[Json, None]:
        """As `follow`, with the text that steps show while they go on (`object` is `delta`)."""
        seen, delay_s, waited_s = after, 0.2, 0.0
        shown: dict[str, tuple[int, int, int]] = {}
        while True:
            try:
                path = f"/v1/runs/{run_id}/events"
                async with aclosing(self._stream(path, str(seen))) as stream:
                    async for event in stream:
                        delay_s, waited_s = 0.2, 0.0
                        if "kind" not in event:
                            place = event["attempt"], event["tries"], event["n"]
                            if place > shown.get(event["step"], (0, 0, 0)):
                                shown[event["step"]] = place
                                yield event
                            continue
                        if event["id"] <= seen:
                            continue
                        seen = event["id"]
                        yield event
                        if event["kind"] in FINAL_KINDS:
                            return
                if await self._is_over(run_id, seen):
                    return
            except Transient:
                if waited_s >= _PATIENCE_S:
                    raise
            waited_s += delay_s
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, 2.0)

    async def _is_over(self, run_id: str, seen: int) -> bool:
        """Whether the run is final and nothing after `seen` is left: the stream may then stay ended."""
        run = await self.get(f"/v1/runs/{run_id}")
        if run["state"] not in FINAL_STATES:
            return False
        left = await self.get(f"/v1/runs/{run_id}/events", {"after": seen, "limit": 1})
        return not left["data"]

    async def feed(
        self, after: str, params: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Json, None]:
        """Yield events of all runs of the org after a place, live, for ever; `now` is the place after all of them.

        A broken stream is opened again as in `follow`.
        """
        if after == "now":  # a place of its own, so that a stream that breaks early goes on there
            now = await self.get(_FEED, {**(params or {}), "after": "now"})
            for event in now["data"]:  # between the question and the answer
                yield event
            after = now["last_id"]
        delay_s, waited_s = 0.2, 0.0
        while True:
            try:
                async with aclosing(self._stream(_FEED, after, params)) as stream:
                    async for event in stream:
                        delay_s, waited_s = 0.2, 0.0
                        after = event["id"]
                        yield event
            except Transient:
                if waited_s >= _PATIENCE_S:
                    raise
            waited_s += delay_s
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, 2.0)

    async def _stream(
        self, path: str, after: str, params: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Json, None]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": after}
        timeout = httpx2.Timeout(60.0, connect=5.0)
        given = _given(params or {})
        try:
            async with self._client.sse(
                path, params=given, headers=headers, timeout=timeout
            ) as source:
                if source.response.is_error:
                    await source.response.aread()
                    raise problem(source.response)
                async for message in source:
                    event = json.loads(message.data) if message.data else None
                    if isinstance(event, dict) and ("kind" in event or message.event == "delta"):
                        yield event
        except httpx2.TransportError as error:
            raise away(self._client.base_url, error) from error

    async def _request(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        try:
            response = await self._client.request(method, path, **arguments)
        except httpx2.TransportError as error:
            raise away(self._client.base_url, error) from error
        if response.is_error:
            raise problem(response)
        return response


def problem(response: httpx2.Response) -> MillpondError:
    """Make an error of a refusal: its class by the status, its words from the problem document."""
    status = response.status_code
    document = _problem_document(response)
    message = document.get("detail") or document.get("title") or f"the server answered {status}"
    error = document.get("error")
    param = error.get("param") if isinstance(error, dict) else None
    kind = _CLASSES.get(status, Permanent)
    return kind(
        str(message),
        code=document.get("code"),
        param=param,
        advice=_advice(response, document),
        details=document,
    )


def _advice(response: httpx2.Response, document: Mapping[str, Any]) -> str | None:
    code, wait_s = document.get("code"), response.headers.get("Retry-After", "")
    if response.status_code == httpx2.codes.UNAUTHORIZED and code not in _NOT_BY_TOKEN:
        return _SIGN_IN
    if response.status_code == httpx2.codes.TOO_MANY_REQUESTS and wait_s.isdecimal():
        return f"Try again in {wait_s} s."
    return _ADVICE.get(str(code)) or document.get("advice")


def find_token(given: str | None, url: str, data_dir: Path) -> str | None:
    """Return the token to send: the given one, or this machine's development token."""
    if given:
        return given
    if not is_this_machine(url):
        return None
    try:
        return (data_dir / DEV_FILE).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_this_machine(url: str) -> bool:
    """Whether an address is of this machine alone."""
    return urlsplit(url).hostname in _LOOPBACK


def _problem_document(response: httpx2.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _json(response: httpx2.Response) -> Json:
    try:
        return response.json()
    except ValueError as error:
        raise Permanent(
            f"{response.url} did not answer with JSON.",
            advice="Is this the address of a Millpond server? Set --url or MILLPOND_URL.",
        ) from error


def away(url: object, error: Exception) -> Unavailable:
    """Make the error of a server that does not answer."""
    return Unavailable(
        f"The server at {url} cannot be reached ({type(error).__name__}).",
        advice="Start it with `millpond up`, or set --url or MILLPOND_URL.",
    )


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
