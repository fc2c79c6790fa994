"""Sessions kept between commands: one 0600 file for each server, in the user's configuration folder.

Written by `login`, `logout` and `org use`, renewed by `renewing`. Invariants: a file that others could read is not
used; a file is replaced whole, under its lock, so that of two commands at once each sees the other's tokens.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from millpond.cli.running import write_private
from millpond.errors import Forbidden, InvalidInput, Unauthenticated

_PORTS = {"http": 80, "https": 443}
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A signed-in session with one server; without a refresh token it is over.

    `renew_at` is in seconds since the epoch, by this machine's clock; `org` is the one chosen for all commands.
    """

    url: str
    email: str
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    renew_at: float
    org: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether only signing in again helps."""
        return not self.refresh_token


class SessionFile:
    """Where the session with one server is kept."""

    def __init__(self, url: str, folder: Path | None = None) -> None:
        self.url = server_of(url)
        self._folder = folder or default_folder()
        self.path = self._folder / f"{_name_of(self.url)}.json"

    def read(self, *, is_strict: bool = True) -> Kept | None:
        """Return what is kept, None for nothing; raises Forbidden for a file that others could read or put there.

        Not strict, it reads such a file too: to end the session in it.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self.path) from error
        with open(handle, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if is_strict and (found.st_mode & _OTHERS or found.st_uid != os.geteuid()):
                raise Forbidden(
                    f"Others can read {self.path}, or it is not yours: it is not used.",
                    code="session_file_open",
                    advice="sign in again with `millpond login`: it ends that session and makes the file anew",
                )
            return self._parsed(file.read())

    def _parsed(self, text: str) -> Kept | None:
        try:
            kept = Kept(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise _unreadable(self.path) from error
        if kept.url != self.url:
            raise _unreadable(self.path)
        return kept

    def write(self, kept: Kept) -> None:
        """Replace what is kept; the caller holds the lock."""
        self._make_folder()
        write_private(self.path, json.dumps(asdict(kept)) + "\n")

    def choose(self, org: str | None) -> None:
        """Keep the org that commands work in; raises Unauthenticated without a session."""
        with self.lock():
            kept = self.read()
            if kept is None:
                raise Unauthenticated(
                    f"Nobody is signed in at {self.url}.", advice="sign in with `millpond login`"
                )
            self.write(replace(kept, org=org))

    def remove(self) -> None:
        """Forget the session; the caller holds the lock."""
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other command changes the session, and keep others waiting meanwhile.

        The empty lock file stays: whoever removed it would let two in.
        """
        self._make_folder()
        path = self.path.with_suffix(".lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def default_folder() -> Path:
    """Return the folder of sessions, under `XDG_CONFIG_HOME` where that is set."""
    return Path(platformdirs.user_config_dir("millpond", appauthor=False)) / "sessions"


def server_of(url: str) -> str:
    """Return an address in the one form that sessions are kept by; raises InvalidInput for what is none."""
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise InvalidInput(f"{url!r} is not an address: {error}", param="--url") from error
    if parts.scheme.lower() not in _PORTS or not host or parts.username or parts.query:
        raise InvalidInput(f"{url!r} is not the http or https address of a server", param="--url")
    scheme = parts.scheme.lower()
    place = f"[{host}]" if ":" in host else host
    shown = "" if port in (None, _PORTS[scheme]) else f":{port}"
    return f"{scheme}://{place}{shown}{parts.path.rstrip('/')}"


def over(url: str) -> Unauthenticated:
    """Make the refusal for a session that nothing can renew."""
    return Unauthenticated(
        f"Your session at {url} has ended.",
        code="session_over",
        advice="sign in again with `millpond login`",
    )


def _name_of(url: str) -> str:
    place = re.sub(r"[^a-z0-9.]+", "-", url.partition("://")[2].lower()).strip("-.")
    return f"{place[:60]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _unreadable(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} is not a session that a command kept.",
        code="session_file",
        advice="sign in again with `millpond login`",
    )
