"""Hints to workers of the same host and user, past the database: a datagram each, in a folder of that user alone.

Called by `hints`. Invariant: these carry no truth either, and the database's hint comes after them; where there is no
such folder, or it is another user's, nobody is near and nothing else changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import structlog

# Of several databases of one host each has its own workers.
_GROUND = """
select s.system_identifier, d.oid
from pg_control_system() s, pg_database d where d.datname = current_database()
"""
_MOST = 8192  # bytes of a datagram
_ECHOES = 64  # how many hints that were heard are remembered
_TRIES = 3
_LOOK_S = 1.0  # so old is what a sender knows of who hears
_log = structlog.get_logger("millpond.nearby")


async def ground_of(con: asyncpg.Connection[asyncpg.Record]) -> str | None:
    """Name the database of a connection among all that this host works with; None where it does not tell."""
    try:
        row = await con.fetchrow(_GROUND)
    except asyncpg.PostgresError:  # it may not be asked, or knows no such question
        return None
    if row is None:
        return None
    return hashlib.sha256(f"{row[0]}/{row[1]}".encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Echo:
    """What the database's hint of the same words carries, so that who heard them nearby does not look twice."""

    sender: str = field(default_factory=lambda: secrets.token_hex(6))
    number: int = 0

    @property
    def name(self) -> str:
        """One word, unlike any queue or id."""
        return f"~{self.sender}.{self.number}"

    def mark(self, payload: str) -> str:
        """Add it as a last word: those who know nothing of it find nothing under it."""
        return f"{payload},{self.name}"

    def next(self) -> Echo:
        """Return that of the next hint."""
        return Echo(self.sender, self.number + 1)


class Neighbours:
    """Tells who hears of a database on this host; never blocks, and never raises."""

    def __init__(self, ground: str) -> None:
        self._ground = ground
        self._socket = _new_socket()
        self._known: list[str] = []
        self._looked_at = -float("inf")

    def tell(self, channel: str, echo: str, payload: str) -> bool:
        """Return whether somebody was told."""
        message = f"{channel} {echo} {payload}".encode(errors="replace")
        if len(message) > _MOST:
            return False
        told = [self._tell(message, path) for path in self._hearing()]
        return any(told)

    def _tell(self, message: bytes, path: str) -> bool:
        try:
            self._socket.sendto(message, path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._known.remove(path)
            _clear_away(path)
            return False
        except OSError:
            # Such as of one who has not read for long: what lies there fills this socket's room, too.
            return False
        return True

    def close(self) -> None:
        """Tell nobody any more."""
        self._socket.close()

    def _hearing(self) -> list[str]:
        now = time.monotonic()
        if now - self._looked_at > _LOOK_S:
            self._looked_at = now
            self._known = _sockets(self._ground)
        return self._known.copy()


class Ear:
    """Hears what neighbours tell; handlers are called in the event loop with the payload."""

    def __init__(self, handlers: Mapping[str, Callable[[str], None]]) -> None:
        self._handlers = handlers
        self._socket: socket.socket | None = None
        self._ground = ""
        self._path = ""
        self._is_reported = False
        self._echoes: deque[str] = deque(maxlen=_ECHOES)

    def open(self, ground: str) -> None:
        """Hear what is told of a database from now on, and of no other one."""
        self.close()
        self._ground = ground
        try:
            self._open()
        except OSError as error:
            # A folder of somebody else, a name too long for a socket, no more files.
            if not self._is_reported:
                _log.info("nearby.unavailable", error=str(error))
            self._is_reported = True

    def _open(self) -> None:
        _sweep()
        own = _new_socket()
        try:
            self._path = _bind(own, f"{self._ground}-{secrets.token_hex(4)}")
        except BaseException:
            own.close()
            raise
        self._socket = own
        asyncio.get_running_loop().add_reader(own.fileno(), self._hear)

    def keep(self) -> None:
        """Hear again where somebody took the folder away, or there was none."""
        if self._ground and (self._socket is None or not _is_there(self._path)):
            self.open(self._ground)

    def has_heard(self, payload: str) -> bool:
        """Whether all that a hint of the database says was heard here before."""
        return payload.rpartition(",")[2] in self._echoes

    def close(self) -> None:
        """Hear nothing any more."""
        self._ground = ""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._socket = None
        _clear_away(self._path)
        _sweep()
        with contextlib.suppress(OSError):  # others have theirs there
            Path(self._path).parent.rmdir()

    def _hear(self) -> None:
        while self._socket is not None:
            try:
                message = self._socket.recv(_MOST)
            except OSError:  # there is no more
                return
            channel, echo, payload = [*message.decode(errors="replace").split(" ", 2), "", ""][:3]
            if echo.startswith("~"):
                self._echoes.append(echo)
            if (handler := self._handlers.get(channel)) is not None:
                handler(payload)


def _new_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.settimeout(0.0)  # never blocks
    return made


def _bind(own: socket.socket, name: str) -> str:
    """Give a socket its name; returns its path. Raises OSError."""
    for _ in range(_TRIES):
        if (folder := _folder(makes=True)) is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # the last one there has just taken it away
            own.bind(str(folder / name))
            return str(folder / name)
    raise FileNotFoundError("there is no folder for it")


def _folder(*, makes: bool = False) -> Path | None:
    """Return the folder of this user's sockets; None where it could be opened by anybody else."""
    user = os.geteuid()
    try:
        folder = Path(tempfile.gettempdir()) / f"millpond-{user}"
        if makes:
            folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077
    return folder if is_own else None


def _sockets(ground: str) -> list[str]:
    folder = _folder()
    if folder is None:
        return []
    try:
        return [str(path) for path in folder.iterdir() if path.name.startswith(ground)]
    except OSError:
        return []


def _sweep() -> None:
    """Clear away what killed processes left."""
    with contextlib.suppress(OSError):
        for path in _sockets(""):
            if not _is_heard(path):
                _clear_away(path)


def _is_heard(path: str) -> bool:
    """Whether the process that made a socket is there still."""
    with _new_socket() as tried:
        try:
            tried.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
        return True


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # it is somebody else's folder by now
        return False


def _clear_away(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()
