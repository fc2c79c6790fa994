"""Retention: finished runs with all that belongs to them, and old keys, are deleted by age.

Called by a loop in every worker; one process at a time does it, a batch in a transaction of its own, with
a pause after each that is several times as long. Invariants: only finished runs are deleted, and no child
of a live run; a key is never kept longer than the run that it stands for.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from dataclasses import dataclass

import structlog

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.errors import Transient

_SQL = queries("retention")
_QUOTAS = queries("quotas")
_log = structlog.get_logger("millpond.retention")

FIRST = uuid.UUID(int=0)
LAST = uuid.UUID(int=2**128 - 1)
BATCH = 500
PASS_S = 3600.0
# At least so many times as long as a batch took, nothing is done: the hot path has the rest.
_REST = 3.0
_MIN_PAUSE_S = 0.1
_IDLE_S = 30.0
_SLOW_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """How long what is kept, in seconds; `runs_s` None keeps runs for ever."""

    runs_s: float | None
    keys_s: float
    inbound_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What one batch did: the last run looked at, how many were over, and whether more may follow."""

    cursor: uuid.UUID
    runs: int
    has_more: bool


def first_id_at(at_s: float) -> uuid.UUID:
    """Return the lowest run id of a time in seconds since 1970: ids are UUIDs of version 7."""
    return uuid.UUID(int=max(0, int(at_s * 1000)) << 80)


async def prune_page(
    con: Connection,
    org_id: int,
    cursor: uuid.UUID,
    *,
    now_s: float,
    older_than_s: float,
    limit: int = BATCH,
    dry_run: bool = False,
) -> Pruned:
    """Delete what is over among an org's next runs; the caller holds the lock of retention."""
    below = first_id_at(now_s - older_than_s)
    rows = await con.fetch(_SQL["page"], org_id, cursor, below, older_than_s, limit)
    over = [row["run_id"] for row in rows if row["is_over"]]
    runs = len(over)
    if over and not dry_run:
        runs = await con.fetchval(_SQL["drop_runs"], org_id, over)
    has_more = len(rows) == limit
    return Pruned(cursor=rows[-1]["run_id"] if has_more else LAST, runs=runs, has_more=has_more)


async def prune_keys(
    con: Connection, *, before_s: float, org_id: int | None = None, limit: int = BATCH
) -> int:
    """Delete the oldest idempotency keys of before a time; returns how many."""
    count: int = await con.fetchval(_SQL["drop_keys"], before_s, org_id, limit)
    return count


async def lock(con: Connection) -> float:
    """Wait until this is the only process that prunes; returns the database's time."""
    now_s: float = await con.fetchval(_SQL["lock"])
    return now_s


class Retention:
    """Prunes batch by batch; remembers which orgs' passes are due and how much fits in a batch."""

    def __init__(self, database: EngineDatabase, keep: Keep) -> None:
        self._database = database
        self._keep = keep
        self._orgs: deque[int] = deque()
        self._limit = BATCH

    async def sweep(self) -> float:
        """Do one batch; returns for how many seconds to leave the database alone."""
        began = time.monotonic()
        try:
            is_busy = await (self._prune_org() if self._orgs else self._begin())
        except Transient:
            self._limit = max(1, self._limit // 2)
            raise
        took_s = time.monotonic() - began
        self._limit = max(1, self._limit // 2) if took_s > _SLOW_S else min(BATCH, self._limit * 2)
        return max(_MIN_PAUSE_S, _REST * took_s) if is_busy else _IDLE_S

    async def _begin(self) -> bool:
        """Delete old keys and received events, and find the orgs whose runs are due to be looked at."""
        keep = self._keep
        async with self._database.duty("retention") as con:
            now_s = await con.fetchval(_SQL["try_lock"])
            if now_s is None:
                return False
            await con.execute(_QUOTAS["old_counts"])
            # A key goes at the latest with the runs of its age, so that it never names one that is gone.
            oldest_s = min(keep.keys_s, keep.runs_s or keep.keys_s)
            keys = await prune_keys(con, before_s=now_s - oldest_s, limit=self._limit)
            events = await con.fetchval(
                _SQL["drop_inbound"], now_s - keep.inbound_s, None, self._limit
            )
            if keys == self._limit or events == self._limit:
                return True
            if keep.runs_s is not None:
                rows = await con.fetch(_SQL["due_orgs"], PASS_S, LAST)
                self._orgs.extend(row["org_id"] for row in rows)
        return bool(self._orgs)

    async def _prune_org(self) -> bool:
        """Look at the next runs of the org whose turn it is."""
        assert self._keep.runs_s is not None
        org_id = self._orgs.popleft()
        async with self._database.duty("prune") as con:
            now_s = await con.fetchval(_SQL["try_lock"])
            if now_s is None:
                self._orgs.clear()
                return False
            cursor = await con.fetchval(_SQL["open_pass"], org_id, PASS_S, LAST, FIRST)
            if cursor is None:
                return True
            pruned = await prune_page(
                con,
                org_id,
                cursor,
                now_s=now_s,
                older_than_s=self._keep.runs_s,
                limit=self._limit,
            )
            await con.execute(_SQL["advance"], org_id, pruned.cursor)
        if pruned.runs:
            _log.info("runs.pruned", org_id=org_id, runs=pruned.runs)
        if pruned.has_more:
            self._orgs.append(org_id)
        return True
