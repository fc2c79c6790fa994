"""The egress guard: the only way to an address that a tenant can name.

Opened by `cli`, called by every room that sends requests to such addresses. Invariants: a name is resolved here and
the connection is made to the very address that was judged; every redirect is judged anew; no proxy and no unix socket
is ever used; an answer has a largest size and a longest time; no request tells what an answer to another one set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore2
import httpx2

from millpond.errors import InvalidInput, Permanent, Unavailable
from millpond.integrations import names
from millpond.integrations.egress_rules import Address, Rules, Target, literal, refused
from millpond.integrations.names import Names

# Returns the addresses of a name, in the order in which they are to be tried; raises OSError.
Resolver = Callable[[str, int], Awaitable[Sequence[Address]]]

_CONNECT_S = 5.0
_MAX_TRIED = 4  # addresses of one name
_SERVER_FAULT = 500
_MOVED = frozenset({301, 302, 303, 307, 308})
_PRIVATE_HEADERS = ("authorization", "cookie", "proxy-authorization")


class _NoCookies(DefaultCookiePolicy):
    """Takes none: what one tenant's address set would be kept for all, and sent for another tenant."""

    def __init__(self) -> None:
        super().__init__(allowed_domains=[])


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """How large an answer may be, how long all of it may take, and how often it may send elsewhere."""

    size_bytes: int = 1 << 20
    time_s: float = 10.0
    redirects: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer, read whole; `url` is where it came from in the end."""

    status: int
    headers: httpx2.Headers
    body: bytes
    url: str


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections to addresses that the rules allow, and to nothing else."""

    def __init__(self, rules: Rules, resolver: Resolver) -> None:
        self._rules = rules
        self._resolver = resolver
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Resolve, judge, connect; raises Permanent (`egress_refused`), or httpcore2's ConnectError."""
        last: Exception | None = None
        for address in await self._allowed(host, port):
            try:
                return await self._sockets.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                last = error
        raise last or httpcore2.ConnectError("the name has no address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: no tenant's address is one of this machine."""
        raise refused("sockets of this machine are closed to it")

    async def sleep(self, seconds: float) -> None:
        """Wait between tries of the pool, of which there are none."""
        await asyncio.sleep(seconds)

    async def _allowed(self, host: str, port: int) -> list[Address]:
        name = host.lower().rstrip(".")
        written = literal(name)
        if written is not None:
            found: Sequence[Address] = [written]
        else:
            try:
                found = await self._resolver(name, port)
            except (OSError, UnicodeError) as error:
                raise httpcore2.ConnectError("the name cannot be resolved") from error
        allowed = [one for one in found if self._rules.allows(name, one, port)]
        if found and not allowed:
            raise refused("it is not on the public internet")
        return allowed[:_MAX_TRIED]


class GuardedTransport(httpx2.AsyncHTTPTransport):
    """A transport for any httpx2 client, such as those of other libraries: every connection goes through the guard."""

    def __init__(self, rules: Rules, resolver: Resolver | None = None) -> None:
        super().__init__(trust_env=False)
        # The pool is a private member of the library: where it is called otherwise, requests would pass by the guard.
        if not isinstance(getattr(self, "_pool", None), httpcore2.AsyncConnectionPool):
            raise TypeError("this release of httpx2 keeps its connections elsewhere")
        self._rules = rules
        self._names = Names()
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(trust_env=False),
            max_connections=100,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
            network_backend=GuardedBackend(rules, resolver or self._names.resolve),
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request where the rules let it go; raises Permanent (`egress_refused`)."""
        self._rules.target(str(request.url))
        return await super().handle_async_request(request)

    async def aclose(self) -> None:
        """Close every connection, and look no more names up."""
        self._names.close()
        await super().aclose()


class Egress:
    """Sends requests to addresses that tenants name; closed by whoever opened it."""

    def __init__(self, rules: Rules, *, resolver: Resolver | None = None) -> None:
        self._rules = rules
        self._client = httpx2.AsyncClient(
            transport=GuardedTransport(rules, resolver),
            cookies=CookieJar(_NoCookies()),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def check(self, url: str, *, param: str) -> None:
        """Raise InvalidInput for an address that could never be asked, before anything is resolved."""
        try:
            self._rules.target(url)
        except Permanent as error:
            raise InvalidInput(
                error.message, code=error.code, param=param, advice=error.advice
            ) from error

    async def get(self, url: str, *, max_bytes: int, timeout_s: float, payer: str = "") -> bytes:
        """Return the body of an answer of 200 to GET, without following redirects.

        Raises Permanent (`egress_refused`, `egress_status`, `egress_too_large`) or Unavailable.
        """
        caps = Caps(size_bytes=max_bytes, time_s=timeout_s)
        reply = await self.request("GET", url, caps=caps, payer=payer)
        if reply.status >= _SERVER_FAULT or reply.status == httpx2.codes.TOO_MANY_REQUESTS:
            raise _unreachable(f"it answered {reply.status}")
        if reply.status != httpx2.codes.OK:
            raise Permanent(f"it answered {reply.status}", code="egress_status")
        return reply.body

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        caps: Caps | None = None,
        payer: str = "",
    ) -> Reply:
        """Send a request and read its answer whole; only GET and HEAD follow redirects, as far as `caps` say.

        `payer` is on whose behalf: nobody has more than some names looked up at once. Raises Permanent
        (`egress_refused`, `egress_too_large`), or Unavailable when nothing good came in time.
        """
        caps = caps or Caps()
        before = names.payer.set(payer)
        try:
            async with asyncio.timeout(caps.time_s):
                return await self._follow(method, url, dict(headers or {}), content, caps)
        except TimeoutError as error:
            raise _unreachable("it took too long") from error
        except httpx2.InvalidURL as error:
            raise refused("the address is malformed") from error
        except httpx2.TransportError as error:
            raise _unreachable("it cannot be reached") from error
        finally:
            names.payer.reset(before)

    async def _follow(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None, caps: Caps
    ) -> Reply:
        left = caps.redirects if method in ("GET", "HEAD") else 0
        while True:
            target = self._rules.target(url)
            reply = await self._once(method, url, headers, content, caps.size_bytes)
            place = reply.headers.get("location")
            if not left or place is None or reply.status not in _MOVED:
                return reply
            left -= 1
            url = str(httpx2.URL(url).join(place))
            if _is_elsewhere(target, self._rules.target(url)):
                headers = {k: v for k, v in headers.items() if k.lower() not in _PRIVATE_HEADERS}

    async def _once(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, most: int
    ) -> Reply:
        # What is packed could unfold to any size.
        asked = {**headers, "Accept-Encoding": "identity"}
        timeout = httpx2.Timeout(None, connect=_CONNECT_S, pool=_CONNECT_S)
        async with self._client.stream(
            method, url, headers=asked, content=content, timeout=timeout
        ) as response:
            body = bytearray()
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise Permanent("it answered in an encoding not asked for", code="egress_encoding")
            async for part in response.aiter_raw():
                body += part
                if len(body) > most:
                    raise Permanent(f"it answered more than {most} bytes", code="egress_too_large")
            return Reply(
                status=response.status_code, headers=response.headers, body=bytes(body), url=url
            )


def _is_elsewhere(one: Target, other: Target) -> bool:
    """Whether what was meant for one may not be told the other."""
    return one != other


def _unreachable(why: str) -> Unavailable:
    return Unavailable(f"The other side did not answer: {why}.", code="egress_failed")
