"""The public keys of outside issuers: read by OpenID Connect Discovery, kept for a while, shared by all orgs.

Called by `outside_reader`. Invariants: at most one question to an issuer is under way in a process, so many for
one org and so many in all; after one that failed the pause doubles, whatever tokens come.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from millpond.errors import Unauthenticated, Unavailable
from millpond.identity.issuer_documents import Keys, Web, read_keys, unreachable

_log = structlog.get_logger("millpond.issuers")
_ASK_S = 8.0  # a whole question: both documents
_MAX_ISSUERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long keys are good without being read again, and how often an issuer may be asked, in seconds."""

    fresh_s: float = 300.0  # then they are read again beside requests
    good_s: float = 3600.0  # then, through an outage, they are good no more
    pause_s: float = 10.0  # between two questions, whatever tokens come
    longest_pause_s: float = 160.0  # between two while they fail, each pause being twice the last


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How many questions may be under way at once: so that nobody's slow issuers hold up those of others."""

    for_org: int = 4
    in_all: int = 32


@dataclass(slots=True)
class _Entry:
    """What is known of one issuer; `read_at` is of the keys, `tried_at` of the last question.

    `failures` counts the questions that failed since the last good answer.
    """

    url: str
    keys: Keys | None = None
    read_at: float = float("-inf")
    tried_at: float = float("-inf")
    failures: int = 0
    failure: Unavailable | None = None
    reading: asyncio.Task[None] | None = field(default=None, repr=False)


class IssuerKeys:
    """Knows the keys of the issuers that it was asked about."""

    def __init__(
        self,
        web: Web,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        room: Room | None = None,
    ) -> None:
        self.web = web
        self._patience = patience or Patience()
        self._clock = clock
        self._room = room or Room()
        # Those used last stand last.
        self._entries: dict[str, _Entry] = {}
        self._under_way: Counter[int] = Counter()

    async def close(self) -> None:
        """End questions that are under way."""
        tasks = [one.reading for one in self._entries.values() if one.reading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def key(self, url: str, kid: str, algorithm: str, *, org_id: int) -> Any:
        """Return a key of an issuer for an org; raises Unauthenticated for one that the issuer does not have.

        Raises Unavailable while the issuer cannot be asked and what is known of it is too old, or too little.
        """
        entry = self._entry(url)
        found = (await self._usable(entry, org_id)).get((kid, algorithm))
        if found is None and (entry.reading is not None or self._may_ask(entry)):
            await self._read(entry, org_id)
            found = (entry.keys or {}).get((kid, algorithm))
        if found is not None:
            return found
        self._check_failure(entry, "The token is signed with a key that is not known here. ")
        raise Unauthenticated(
            "The token is signed with a key that its issuer does not publish for this algorithm.",
            code="token_unknown_key",
            advice="get a new token; a key that was published just now is known within seconds",
        )

    async def test(self, url: str, *, org_id: int) -> Keys:
        """Ask an issuer now, unless it was asked just now; raises Unavailable saying what is wrong."""
        entry = self._entry(url)
        # Whoever has mended an issuer need not wait as long as tokens do.
        if entry.reading is not None or self._rested_s(entry) >= self._patience.pause_s:
            await self._read(entry, org_id)
        self._check_failure(entry)
        return entry.keys or {}

    def _entry(self, url: str) -> _Entry:
        entry = self._entries.pop(url, None)
        if entry is None:
            if len(self._entries) >= _MAX_ISSUERS:
                self._forget_one()
            entry = _Entry(url=url)
        self._entries[url] = entry
        return entry

    def _forget_one(self) -> None:
        """Forget whom nobody used for longest; never one that rests, which would be asked again too soon."""
        idle = (one for one in self._entries.values() if one.reading is None and self._may_ask(one))
        oldest = next(idle, None)
        if oldest is None:
            raise _busy()
        del self._entries[oldest.url]

    async def _usable(self, entry: _Entry, org_id: int) -> Keys:
        age_s = self._clock() - entry.read_at
        if entry.keys is None or age_s > self._patience.good_s:
            if entry.reading is not None or self._may_ask(entry):
                await self._read(entry, org_id)
            self._check_failure(entry)
        elif age_s > self._patience.fresh_s and self._may_ask(entry) and self._has_room(org_id):
            self._start(entry, org_id)
        return entry.keys or {}

    def _check_failure(self, entry: _Entry, before: str = "") -> None:
        """Raise what the last question came to, if nothing good: anew, since an exception belongs to who catches it."""
        failure = entry.failure
        if failure is not None:
            raise Unavailable(
                f"{before}{failure.message}",
                code=failure.code,
                advice=failure.advice,
                retry_after_s=max(1.0, self._pause_s(entry) - self._rested_s(entry)),
            ) from failure.__cause__

    def _rested_s(self, entry: _Entry) -> float:
        return self._clock() - entry.tried_at

    def _pause_s(self, entry: _Entry) -> float:
        doubled = self._patience.pause_s * float(1 << min(max(entry.failures - 1, 0), 10))
        return min(doubled, max(self._patience.longest_pause_s, self._patience.pause_s))

    def _may_ask(self, entry: _Entry) -> bool:
        return self._rested_s(entry) >= self._pause_s(entry)

    def _has_room(self, org_id: int) -> bool:
        is_full = self._under_way.total() >= self._room.in_all
        return not is_full and self._under_way[org_id] < self._room.for_org

    async def _read(self, entry: _Entry, org_id: int) -> None:
        """Ask, or wait for the answer that somebody else waits for; raises Unavailable where there is no room."""
        if entry.reading is None and not self._has_room(org_id):
            raise _busy()
        await asyncio.shield(self._start(entry, org_id))

    def _start(self, entry: _Entry, org_id: int) -> asyncio.Task[None]:
        if entry.reading is None:
            entry.tried_at = self._clock()
            self._under_way[org_id] += 1
            entry.reading = asyncio.create_task(self._ask(entry, org_id), name="issuer keys")
            entry.reading.add_done_callback(lambda _: self._leave(org_id))
        return entry.reading

    def _leave(self, org_id: int) -> None:
        self._under_way[org_id] -= 1
        if self._under_way[org_id] <= 0:
            del self._under_way[org_id]

    async def _ask(self, entry: _Entry, org_id: int) -> None:
        try:
            async with asyncio.timeout(_ASK_S):
                entry.keys = await read_keys(self.web, entry.url, payer=f"org:{org_id}")
            entry.read_at = self._clock()
            entry.failure, entry.failures = None, 0
        except TimeoutError:
            self._fail(entry, unreachable(entry.url))
        except Unavailable as error:
            self._fail(entry, error)
        finally:
            entry.reading = None

    def _fail(self, entry: _Entry, failure: Unavailable) -> None:
        entry.failure = failure
        entry.failures += 1
        _log.warning("issuer.unavailable", issuer=entry.url, code=failure.code)


def _busy() -> Unavailable:
    return Unavailable(
        "Too many issuers are being asked for their keys at this moment.",
        code="issuer_busy",
        retry_after_s=10.0,
    )
