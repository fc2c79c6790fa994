"""Published heads: how far each chain was, in files outside the database.

Written by the sealer after its commit, read by whoever verifies: a log whose end was cut off, or that was written anew
from somewhere on, no longer has what was published. Invariants: a file is 0600 and only grows, its places only rise;
a line that was torn by a crash is passed over.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import orjson

from millpond.identity.audit_chain import Head, time_text
from millpond.types import NO_ORG

_MODE = 0o600
# More than a line has.
_TAIL_BYTES = 4096


class Heads:
    """The published heads in one folder, a file for each log."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def publish(self, head: Head) -> bool:
        """Add a head to its log's file unless a later one is there, and wait for the disk; whether it was added."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path(head.org_id), os.O_RDWR | os.O_CREAT | os.O_APPEND, _MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            tail = _tail(file)
            last = _last(tail)
            if last is not None and last.seq >= head.seq:
                return False
            torn = b"\n" if tail and not tail.endswith(b"\n") else b""
            os.write(file, torn + _line(head))
            os.fsync(file)
        finally:
            os.close(file)
        return True

    def last(self, org_id: int) -> Head | None:
        """Return the newest head of a log that was published here."""
        try:
            file = os.open(self._path(org_id), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return _last(_tail(file))
        finally:
            os.close(file)

    def read(self, org_id: int, *, after: int = 0) -> Iterator[Head]:
        """Yield the heads of a log above a place that are published now, in their order."""
        try:
            file = self._path(org_id).open("rb")
        except FileNotFoundError:
            return
        with file:
            left = os.fstat(file.fileno()).st_size
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                head = _read(line)
                if head is not None and head.seq > after:
                    yield head

    def _path(self, org_id: int) -> Path:
        name = "platform" if org_id == NO_ORG else f"org-{org_id}"
        return self._folder / f"{name}.jsonl"


def _line(head: Head) -> bytes:
    return orjson.dumps(
        {
            "org": head.org_id,
            "seq": head.seq,
            "mac": head.mac.hex(),
            "key_id": head.key_id,
            "sealed_at": time_text(head.sealed_at),
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def _read(line: bytes) -> Head | None:
    try:
        found = orjson.loads(line)
        return Head(
            org_id=int(found["org"]),
            seq=int(found["seq"]),
            mac=bytes.fromhex(found["mac"]),
            key_id=str(found["key_id"]),
            sealed_at=datetime.fromisoformat(found["sealed_at"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _last(tail: bytes) -> Head | None:
    heads = map(_read, reversed(tail.splitlines()))
    return next((head for head in heads if head is not None), None)


def _tail(file: int) -> bytes:
    """Return the end of a file; its first line may be cut."""
    size = os.fstat(file).st_size
    return os.pread(file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
