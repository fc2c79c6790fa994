"""The key file: the installation's keys where no variable holds them, one a line, the newest first.

Called by `cli`. Invariants: only its owner can read it; it appears and changes whole or not at all, and a
change loses no key, whoever else changes it at the same time.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from millpond.errors import InvalidInput, Permanent
from millpond.identity.seal import KEY_BYTES, Seal


def read(path: Path) -> list[Seal]:
    """Return the keys of a file; raises Permanent where others can read it, InvalidInput for what is no key."""
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise Permanent(
            f"{path} can be read by others",
            code="key_file_exposed",
            advice=f"chmod 600 {path}, and rotate the key if others had access",
        )
    seals = [Seal.from_text(line) for line in _lines(path)]
    if not seals:
        raise InvalidInput(f"{path} holds no key", code="key_file_empty")
    return seals


def make(path: Path) -> None:
    """Make a file with a new key unless there is one.

    Safe when several processes start together: all of them find the file of whoever came first. Blocking.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):
        draft = _draft(path, [_new_key()])
        try:
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink()
        _sync(path.parent)


def add(path: Path) -> Seal:
    """Put a new key before those of a file; returns it. Blocking: one after the other."""
    with _locked(path):
        read(path)
        key = _new_key()
        _draft(path, [key, *_lines(path)]).replace(path)
        _sync(path.parent)
    return Seal.from_text(key)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let nobody else change the file until the block ends; the lock is a file beside it, which stays."""
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Make durable which files a folder has."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="ascii")
    return [line for line in map(str.strip, text.splitlines()) if line]


def _new_key() -> str:
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


def _draft(path: Path, lines: list[str]) -> Path:
    """Write a 0600 file beside `path`, durably."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, "".join(f"{line}\n" for line in lines).encode())
        os.fsync(file)
    finally:
        os.close(file)
    return draft
