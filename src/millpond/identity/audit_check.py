"""Verifying an audit log: every seal is computed again, in a stream, and held against what was published.

Called by `millpond audit verify` and by the API. Invariants: memory does not grow with the log; a fault never hides
those after it, since the chain is followed by the seals as they are stored.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput, Permanent
from millpond.identity.audit_chain import PURPOSE, START, Head, Keys, entry_of, mac_of
from millpond.identity.audit_heads import Heads
from millpond.identity.audit_sealer import head_of, statement
from millpond.types import NO_ORG

Open = Callable[[], AbstractAsyncContextManager[Connection]]

_SQL = queries("audit_chain")
_PAGE = 1000
# The sealer is at most seconds behind: a row that waits longer has been passed over.
_LATE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What does not fit: which kind, at which place of the chain, in which row."""

    kind: str
    text: str
    seq: int | None = None
    audit_id: uuid.UUID | None = None


@dataclass(kw_only=True, slots=True)
class Report:
    """What verifying a log found: `sealed` rows looked at, up to `last_seq`, and rows that wait for a seal.

    `is_new` is of the org, or of the installation: its log may well be empty.
    """

    org_id: int
    sealed: int = 0
    last_seq: int = 0
    has_more: bool = False
    head: Head | None = None
    unsealed: int = 0
    oldest_unsealed_s: float | None = None
    published_seq: int | None = None
    is_new: bool = False
    fault_count: int = 0
    first_fault: Fault | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def is_intact(self) -> bool:
        """Whether nothing was found."""
        return self.fault_count == 0

    @property
    def is_unproven(self) -> bool:
        """Whether nothing outside of the log tells how far it went; a new one may be empty."""
        return self.published_seq is None and not (self.is_new and self.sealed == 0)

    def add(self, fault: Fault) -> None:
        """Keep a fault: the first ones whole, the rest as a count."""
        self.fault_count += 1
        self.first_fault = self.first_fault or fault
        if len(self.faults) < 20:
            self.faults.append(fault)


class Auditor:
    """Verifies logs with the installation's keys and the heads that were published here."""

    def __init__(self, keys: Keys, heads: Heads) -> None:
        self._keys = keys
        self.heads = heads

    async def verify(
        self,
        transaction: Open,
        org_id: int,
        *,
        after: int = 0,
        limit: int | None = None,
        is_thorough: bool = True,
    ) -> Report:
        """Verify a log from a place on, `limit` seals at most; `transaction` opens one in which it can be read.

        A thorough look also finds rows that were never to be sealed, which reads the whole log.
        """
        walk = _Walk(self._keys, Report(org_id=org_id, last_seq=after))
        report = walk.report
        published = self.heads.read(org_id, after=after)
        async with transaction() as con:
            await walk.begin(con, after)
        # Heads of now are of seals that were committed before: the walk meets them all.
        walk.follow(published)
        while True:
            wanted = _PAGE if limit is None else min(_PAGE, limit - report.sealed)
            async with transaction() as con:
                rows = await con.fetch(
                    statement("links", org_id), org_id, report.last_seq, wanted + 1
                )
            for row in rows[:wanted]:
                walk.step(row)
            report.has_more = len(rows) > wanted
            if not report.has_more or (limit is not None and report.sealed >= limit):
                break
        if not report.has_more:
            walk.end()
        async with transaction() as con:
            await _look_at_the_rest(con, report, is_thorough=is_thorough)
        return report


def verify_lines(keys: Keys, lines: Iterable[bytes]) -> Report:
    """Verify an export (NDJSON); one that begins amid a chain is taken from its first row on.

    Raises InvalidInput for a line that is none of an export.
    """
    walk: _Walk | None = None
    report = Report(org_id=NO_ORG)
    for number, text in enumerate(lines, 1):
        row = _row_of(text, number)
        if row["seq"] is None:
            report.unsealed += 1
            continue
        if walk is None:
            report.org_id, report.last_seq = row["org"], row["seq"] - 1
            walk = _Walk(keys, report)
            if row["seq"] > 1:
                walk.take(row)
                continue
        walk.step(row)
    return report


def _row_of(text: bytes, number: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = orjson.loads(text)
        row["audit_id"] = uuid.UUID(row["audit_id"])
        row["run_id"] = None if row["run_id"] is None else uuid.UUID(row["run_id"])
        row["at"] = datetime.fromisoformat(row["at"])
        if row["seq"] is not None:
            row["sealed_at"] = datetime.fromisoformat(row["sealed_at"])
            row["mac"] = bytes.fromhex(row["mac"])
        row["has_row"] = True
        entry_of(row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"line {number} is not of an export as NDJSON", param="file") from error
    return row


class _Walk:
    """One way along a chain, seal after seal, with the published heads beside."""

    def __init__(self, keys: Keys, report: Report) -> None:
        self.report = report
        self._keys = keys
        self._known: dict[str, bytes | None] = {}
        self._previous = START
        self._published: Iterator[Head] = iter(())
        self._awaited: Head | None = None

    async def begin(self, con: Connection, after: int) -> None:
        """Take the seal at a place as given: it was verified by whoever went up to it."""
        if after == 0:
            return
        org_id = self.report.org_id
        mac = await con.fetchval(statement("mac_at", org_id), org_id, after)
        if mac is None:
            self._fault("seal_removed", f"there is no seal {after}", seq=after)
        self._previous = mac or START

    def take(self, row: Any) -> None:
        """Take a seal as given."""
        self._previous, self.report.last_seq = row["mac"], row["seq"]

    def follow(self, published: Iterator[Head]) -> None:
        """Hold the seals that come against these heads."""
        self._published = published
        self._await_next()

    def step(self, row: Any) -> None:
        """Verify one seal with its row."""
        report, seq, mac = self.report, row["seq"], bytes(row["mac"])
        audit_id = uuid.UUID(int=row["audit_id"].int)
        if seq != report.last_seq + 1:
            missing = report.last_seq + 1
            self._fault("seal_removed", f"seals {missing} to {seq - 1} are missing", seq=missing)
        elif not row["has_row"]:
            self._fault("row_removed", "its row is gone", seq=seq, audit_id=audit_id)
        elif (key := self._key(row["key_id"])) is None:
            text = f"it was sealed with the key {row['key_id']}, which is not known here"
            self._fault("key_unknown", text, seq=seq, audit_id=audit_id)
        elif mac != mac_of(
            key,
            self._previous,
            entry_of(row),
            org_id=report.org_id,
            seq=seq,
            key_id=row["key_id"],
            sealed_at=row["sealed_at"],
        ):
            text = "the row or its seal was changed, exchanged, or put in another place"
            self._fault("row_changed", text, seq=seq, audit_id=audit_id)
        self._hold_against_published(seq, mac, audit_id)
        self._previous, report.last_seq = mac, seq
        report.sealed += 1

    def end(self) -> None:
        """Say what was published of the chain beyond its end."""
        last = self._awaited
        if last is None:
            return
        for head in self._published:
            last = head
        self.report.published_seq = last.seq
        missing = self.report.last_seq + 1
        text = f"seals {missing} to {last.seq} were published and are missing"
        self._fault("tail_cut", text, seq=missing)

    def _hold_against_published(self, seq: int, mac: bytes, audit_id: uuid.UUID) -> None:
        while self._awaited is not None and self._awaited.seq < seq:
            self._await_next()  # a gap, told of already
        if self._awaited is not None and self._awaited.seq == seq:
            if self._awaited.mac != mac:
                text = "another seal was published for this place: the log was written anew"
                self._fault("fork", text, seq=seq, audit_id=audit_id)
            self._await_next()

    def _await_next(self) -> None:
        self._awaited = next(self._published, None)
        if self._awaited is not None:
            self.report.published_seq = self._awaited.seq

    def _key(self, key_id: str) -> bytes | None:
        if key_id not in self._known:
            try:
                self._known[key_id] = self._keys.derive(PURPOSE, key_id)
            except Permanent:
                self._known[key_id] = None
        return self._known[key_id]

    def _fault(
        self, kind: str, text: str, *, seq: int | None = None, audit_id: uuid.UUID | None = None
    ) -> None:
        self.report.add(Fault(kind=kind, text=text, seq=seq, audit_id=audit_id))


async def _look_at_the_rest(con: Connection, report: Report, *, is_thorough: bool) -> None:
    """Tell of rows without a seal, and of the head as it is now."""
    org_id = report.org_id
    report.head = await head_of(con, org_id)
    report.is_new = await con.fetchval(_SQL["is_new"], org_id)
    waiting = await con.fetchrow(statement("waiting", org_id), org_id)
    assert waiting is not None
    report.unsealed, report.oldest_unsealed_s = waiting["rows"], waiting["oldest_s"]
    if waiting["gone_id"] is not None:
        text = "a row was removed before it was sealed"
        report.add(Fault(kind="row_removed", text=text, audit_id=waiting["gone_id"]))
    if report.oldest_unsealed_s is not None and report.oldest_unsealed_s > _LATE_S:
        text = f"a row waits for its seal for {report.oldest_unsealed_s:.0f} s: does the API run?"
        report.add(Fault(kind="unsealed", text=text, audit_id=waiting["oldest_id"]))
    if not is_thorough:
        return
    passed_over = await con.fetchval(statement("unmarked", org_id), org_id)
    if passed_over is not None:
        text = "a row has no seal and was not to get one: it was put in, or its mark was removed"
        report.add(Fault(kind="unsealed", text=text, audit_id=passed_over))
