"""Deltas: text that steps write while they go on, such as a model's words, gathered and stored for whoever watches.

Called by `performing` and `step_tries`, one Deltas per session of a worker. Invariants: nothing is stored
without a lease, and what is stored may be lost in a crash: the whole stands in the step's record; no secret that the
run has opened is in it, however it came in pieces; what a try wrote is stored before its record is, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from millpond.db.pool import EngineDatabase
from millpond.db.queries import queries
from millpond.engine.hints import Hints
from millpond.engine.leases import Lease
from millpond.errors import MillpondError, Transient
from millpond.veil import Stream, Veil

_SQL = queries("deltas")
_log = structlog.get_logger("millpond.deltas")
# So long pieces are gathered before they are stored.
GATHER_S = 0.1
# More of one try is not shown while it goes on.
MAX_BYTES = 256 * 1024
KEEP_S = 10.0
_FORGET_BATCH = 1000
_TRIES = 5
_AGAIN_S = 0.2


class _Row(NamedTuple):
    text: Growing
    n: int
    piece: str


class Growing:
    """The text of one try of a step, as it grows; used in the thread of the worker's loop alone."""

    def __init__(
        self, deltas: Deltas, lease: Lease, step_key: str, tries: int, veil: Veil | None
    ) -> None:
        self.lease = lease
        self.step_key = step_key
        self.tries = tries
        self._deltas = deltas
        self._stream = Stream(Veil() if veil is None else veil)
        self._pieces: list[str] = []
        self._bytes = 0
        self._n = 0
        self._is_over = False
        self._stored = asyncio.Event()
        self._stored.set()

    def feed(self, piece: str) -> None:
        """Add a piece; it is stored within about `GATHER_S`, unless it may be the beginning of a secret."""
        if not self._is_over:
            # Postgres has no place for a NUL in text; out before the look for secrets, which it would part.
            self._add(self._stream.feed(piece.replace("\0", "")))

    async def end(self) -> None:
        """Wait until all of it is stored, or is not going to be; nothing is added from then on."""
        if not self._is_over:
            self._add(self._stream.end())
            self._is_over = True
        if not self._stored.is_set():
            self._deltas.hurry()
            await self._stored.wait()

    def cut(self) -> None:
        """Add nothing from now on, and wait for nothing: what is not stored yet is given up."""
        self._is_over = True
        self._pieces.clear()

    def take(self) -> _Row | None:
        """Take what was gathered, to be stored as one row."""
        if not self._pieces:
            return None
        piece = "".join(self._pieces)
        self._pieces.clear()
        self._n += 1
        return _Row(self, self._n, piece)

    def settle(self, *, is_stored: bool) -> None:
        """Take note of what became of the row that was taken; without it, nothing more is stored."""
        if not is_stored:
            self._is_over = True
            self._pieces.clear()
        if not self._pieces:
            self._stored.set()

    def _add(self, piece: str) -> None:
        raw = piece.encode("utf-8", "replace")[: MAX_BYTES - self._bytes]
        if not raw:
            return
        self._bytes += len(raw)
        self._pieces.append(raw.decode("utf-8", "ignore"))
        self._stored.clear()
        self._deltas.gather(self)


class Deltas:
    """Stores what was gathered of all steps of one worker, in one statement, ten times a second at most."""

    def __init__(self, database: EngineDatabase, hints: Hints) -> None:
        self._database = database
        self._hints = hints
        self._waiting: dict[Growing, None] = {}
        self._sender: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._is_closed = False

    def open(self, lease: Lease, step_key: str, tries: int, veil: Veil | None) -> Growing:
        """Begin the text of a try."""
        return Growing(self, lease, step_key, tries, veil)

    def gather(self, text: Growing) -> None:
        """Store what a text has gathered, soon."""
        if self._is_closed:
            text.settle(is_stored=False)
            return
        self._waiting[text] = None
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all(), name="deltas")

    def hurry(self) -> None:
        """Store what was gathered now: somebody waits."""
        self._hurry.set()

    async def close(self) -> None:
        """Store nothing more."""
        self._is_closed = True
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self) -> None:
        rows: list[_Row] = []
        try:
            while self._waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._hurry.wait()
                self._hurry.clear()
                texts, self._waiting = list(self._waiting), {}
                rows = [row for text in texts if (row := text.take()) is not None]
                # Steps are locked before the runs of others, elsewhere: never both in one transaction.
                for part in _parts(rows):
                    await self._insist(part)
                rows = []
        finally:
            self._sender = None
            for text in (
                *self._waiting,
                *(row.text for row in rows),
            ):  # only when this worker stops
                text.settle(is_stored=False)

    async def _insist(self, rows: Sequence[_Row]) -> None:
        """Store rows, again after a lost connection; given up soon, since the record tells the whole."""
        stored: set[int] = set()
        for _ in range(_TRIES):
            try:
                stored = await self._store(rows)
                break
            except Transient:
                await asyncio.sleep(_AGAIN_S)
            except MillpondError as error:
                _log.error("deltas.refused", error=error.code)
                break
        for nth, row in enumerate(rows, 1):
            row.text.settle(is_stored=nth in stored)

    async def _store(self, rows: Sequence[_Row]) -> set[int]:
        leases = [row.text.lease for row in rows]
        async with self._database.duty("deltas", durable=False) as con:
            held = await con.fetch(
                _SQL["add"],
                [lease.org_id for lease in leases],
                [lease.item_id for lease in leases],
                [lease.token for lease in leases],
                [lease.run_id for lease in leases],
                [row.text.step_key for row in rows],
                [lease.attempt for lease in leases],
                [row.text.tries for row in rows],
                [row.n for row in rows],
                [row.piece for row in rows],
            )
        self._hints.changed({lease.run_id for lease in leases})
        return {row["ord"] for row in held}


async def forget(database: EngineDatabase) -> bool:
    """Remove text of tries that are over; returns whether there may be more."""
    async with database.statement("forget_deltas") as con:
        count: int = await con.fetchval(_SQL["forget"], KEEP_S, _FORGET_BATCH)
    return count == _FORGET_BATCH


def _parts(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Part rows of steps elsewhere from those of runs, each in the order in which live rows are locked."""
    parts: tuple[list[_Row], list[_Row]] = ([], [])
    for row in sorted(rows, key=lambda row: row.text.lease.item_id.bytes):
        parts[row.text.lease.is_of_step].append(row)
    return [part for part in parts if part]
