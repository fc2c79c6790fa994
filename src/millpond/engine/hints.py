"""Hints: coalesced NOTIFY after commits, and the connection that listens for them; past both to workers of this host.

Called after a commit by whoever changed something; heard by workers and event tails. Invariant: a
hint carries no truth; whoever misses one finds the change by polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import asyncpg
import structlog

from millpond.engine.nearby import Ear, Echo, Neighbours, ground_of

WAKE = "millpond_wake"  # payload: queue names, separated by commas
CHANGED = "millpond_changed"  # payload: tails of run ids, separated by commas, or `*`
CANCELLED = "millpond_cancelled"  # payload: run ids, separated by commas
SUMMONED = "millpond_summoned"  # payload: worker ids, separated by commas

# A transaction that only notifies writes a commit record; nobody needs it on disk. The setting ends with the
# statement: behind a transaction pooler, the next one on this connection may be anybody's.
_SEND = """
select set_config('synchronous_commit', 'off', true), pg_notify(c, p) from unnest($1::text[], $2::text[]) as u(c, p)
"""
_MAX_PAYLOAD = 7900  # NOTIFY takes less than 8,000 bytes
_ERRORS = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_log = structlog.get_logger("millpond.hints")


def tail_of(run_id: uuid.UUID) -> str:
    """Return the short form of a run id in hints: its last 8 hex digits, which are random."""
    return run_id.hex[-8:]


class Hints:
    """Sends hints on a connection of its own, many in one statement, never blocking the caller.

    Where they are `near`, what comes after a rest is told to workers of this host at once, and a moment later to all
    others. Those of workers are not: who has no room itself is not to be told in place of others.
    """

    def __init__(self, url: str, *, near: bool = False, pause_s: float = 0.01) -> None:
        self._url = url
        self._is_near = near
        self._pause_s = pause_s
        self._near: Neighbours | None = None
        # Nobody was told anything for a while.
        self._is_rested = True
        # Of these channels workers of this host know all that goes to the database next.
        self._told: set[str] = set()
        self._echo = Echo()
        channels = (WAKE, CHANGED, CANCELLED, SUMMONED)
        self._pending: dict[str, set[str]] = {channel: set() for channel in channels}
        self._kick = asyncio.Event()
        self._is_pressing = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, *, near: bool = False, pause_s: float = 0.01) -> Hints:
        """Start sending; the connection is opened soon, before the first hint wants it, and reopened when it breaks."""
        hints = cls(url, near=near, pause_s=pause_s)
        hints._sender = asyncio.create_task(hints._send_all(), name="hints")
        return hints

    def wake(self, queues: Iterable[str]) -> None:
        """Tell workers that work may be ready in `queues`."""
        self._add_near(WAKE, set(queues))

    def changed(self, run_ids: Iterable[uuid.UUID]) -> None:
        """Tell event tails that runs have new events."""
        self._add(CHANGED, map(tail_of, run_ids))

    def cancelled(self, run_ids: Iterable[uuid.UUID]) -> None:
        """Tell workers that runs shall stop."""
        self._add_near(CANCELLED, set(map(str, run_ids)))

    def summon(self, worker_ids: Iterable[uuid.UUID]) -> None:
        """Tell workers that there is room for steps of theirs."""
        self._add_near(SUMMONED, set(map(str, worker_ids)))

    async def close(self) -> None:
        """Stop sending; hints not yet sent are dropped."""
        if self._sender is not None:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender

    def _add(self, channel: str, words: Iterable[str]) -> None:
        self._pending[channel].update(words)
        if self._pending[channel]:
            self._is_pressing.set()
            self._kick.set()

    def _add_near(self, channel: str, words: AbstractSet[str]) -> None:
        """Tell workers of this host, where nobody was told anything lately; those of others wait a moment then."""
        if not words:
            return
        if self._is_rested and self._near is not None and not self._pending[channel]:
            self._is_rested = False
            if self._near.tell(channel, self._echo.name, ",".join(words)):
                self._told.add(channel)
                self._pending[channel].update(words)
                self._kick.set()
                return
        if not self._told:
            self._is_pressing.set()
        self._told.discard(channel)
        self._pending[channel].update(words)
        self._kick.set()

    def _take(self) -> list[tuple[str, str]]:
        messages = []
        for channel, words in self._pending.items():
            if not words:
                continue
            payload = ",".join(words)
            if channel in self._told:
                payload = self._echo.mark(payload)
            words.clear()
            while len(payload) > _MAX_PAYLOAD:
                cut = payload.rindex(",", 0, _MAX_PAYLOAD)
                messages.append((channel, payload[:cut]))
                payload = payload[cut + 1 :]
            messages.append((channel, payload))
        self._told.clear()
        self._echo = self._echo.next()
        self._is_rested = False
        return messages

    async def _send_all(self) -> None:
        con: asyncpg.Connection[asyncpg.Record] | None = None
        try:
            with contextlib.suppress(*_ERRORS):
                con = await self._connect()
                await send(con, [])
            while True:
                await self._kick.wait()
                if not self._is_pressing.is_set():
                    await self._wait_a_moment()
                self._kick.clear()
                self._is_pressing.clear()
                messages = self._take()
                try:
                    if con is None or con.is_closed():
                        con = await self._connect()
                    await send(con, messages)
                except _ERRORS:
                    if con is not None:
                        con.terminate()
                    con = None  # dropped: polling finds what these hints told of
                    await asyncio.sleep(0.5)
                await asyncio.sleep(self._pause_s)
                self._is_rested = not self._kick.is_set()
        finally:
            if con is not None:
                con.terminate()
            self._part()

    async def _wait_a_moment(self) -> None:
        """Let who was told by itself begin first; returns sooner where a hint presses."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_s / 2):
                await self._is_pressing.wait()

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        con = await connect(self._url)
        if self._is_near:
            try:
                ground = await ground_of(con)
                self._part()
                self._near = None if ground is None else Neighbours(ground)
            except BaseException:
                con.terminate()
                raise
        return con

    def _part(self) -> None:
        if self._near is not None:
            self._near.close()
            self._near = None


async def connect(url: str) -> asyncpg.Connection[asyncpg.Record]:
    """Open a connection to send on."""
    return await asyncpg.connect(
        url, timeout=5, server_settings={"application_name": "millpond-hints"}
    )


async def send(
    con: asyncpg.Connection[asyncpg.Record], messages: Sequence[tuple[str, str]]
) -> None:
    """Send pairs of channel and payload in one round trip, without waiting for the disk; leaves no setting behind."""
    await con.execute(
        _SEND, [channel for channel, _ in messages], [payload for _, payload in messages]
    )


class Listener:
    """Hears hints on a direct connection, reopened when it breaks.

    Handlers are called in the event loop with the payload; after a reconnect each is called with
    `*`, since anything may have been missed. Where it is `near`, it hears what this host tells its workers as well.
    """

    def __init__(
        self, url: str, handlers: Mapping[str, Callable[[str], None]], *, near: bool = False
    ) -> None:
        self._url = url
        self._handlers = handlers
        self._ear = Ear(handlers) if near else None
        self._keeper: asyncio.Task[None] | None = None
        self._con: asyncpg.Connection[asyncpg.Record] | None = None

    async def start(self) -> None:
        """Open the connection, and keep it open from then on."""
        with contextlib.suppress(*_ERRORS):
            await self._open()
        self._keeper = asyncio.create_task(self._keep(), name="listener")

    async def close(self) -> None:
        """Stop listening."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._ear is not None:
            self._ear.close()
        if self._con is not None:
            self._con.terminate()

    async def _open(self) -> None:
        con = await asyncpg.connect(
            self._url, timeout=5, server_settings={"application_name": "millpond-listen"}
        )
        try:
            for channel, handler in self._handlers.items():
                await con.add_listener(channel, self._receiver(handler))
            if self._ear is not None and (ground := await ground_of(con)) is not None:
                self._ear.open(ground)
        except BaseException:
            con.terminate()
            raise
        self._con = con

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if self._ear is not None:
                self._ear.keep()
            if self._con is not None and not self._con.is_closed():
                continue
            try:
                await self._open()
            except _ERRORS as error:
                _log.warning("listener.reconnect_failed", error=type(error).__name__)
                continue
            for handler in self._handlers.values():
                handler("*")

    def _receiver(self, handler: Callable[[str], None]) -> Callable[..., None]:
        def receive(_con: object, _pid: int, _channel: str, payload: object) -> None:
            if self._ear is None or not self._ear.has_heard(str(payload)):
                handler(str(payload))

        return receive
