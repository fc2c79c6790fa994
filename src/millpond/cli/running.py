"""The note that `millpond up` leaves for other commands: where its database and its API are.

Written by `up`, read by `worker`, `token` and `doctor` when no database address is set. Invariant:
the file is 0600 and counts only while the process that wrote it lives.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from millpond.cli.config import Databases, external_databases
from millpond.errors import InvalidInput
from millpond.settings import Settings

_FILE = "running.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A live `millpond up`: its process, when that began, its API and its database."""

    pid: int
    began_s: float
    url: str
    databases: Databases

    @property
    def host(self) -> str:
        """The address that its API listens on."""
        return urlsplit(self.url).hostname or ""


def note_running(data_dir: Path, url: str, databases: Databases) -> None:
    """Leave the note for this process; the owner's address is not part of it."""
    me = psutil.Process()
    known = Databases(
        app=databases.app, engine=databases.engine, owner=None, listen=databases.listen
    )
    note = Running(pid=me.pid, began_s=me.create_time(), url=url, databases=known)
    write_private(data_dir / _FILE, json.dumps(asdict(note)))


def forget_running(data_dir: Path) -> None:
    """Remove the note."""
    (data_dir / _FILE).unlink(missing_ok=True)


def find_running(data_dir: Path) -> Running | None:
    """Return the live `millpond up` of this data folder, or None."""
    try:
        note = json.loads((data_dir / _FILE).read_text(encoding="utf-8"))
        running = Running(
            pid=int(note["pid"]),
            began_s=float(note["began_s"]),
            url=str(note["url"]),
            databases=Databases(**note["databases"]),
        )
        began_s = psutil.Process(running.pid).create_time()
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return running if abs(began_s - running.began_s) < 1.0 else None


def find_databases(settings: Settings) -> Databases:
    """Return the database to use: the operator's, or that of the `millpond up` on this machine.

    Raises InvalidInput when there is neither.
    """
    external = external_databases(settings)
    if external is not None:
        return external
    running = find_running(settings.data_dir)
    if running is None:
        raise InvalidInput(
            f"MILLPOND_DATABASE_URL is not set, and no `millpond up` runs on {settings.data_dir}",
            advice="Set it to the address of your Postgres, or start `millpond up`.",
        )
    return running.databases


def write_private(path: Path, text: str) -> None:
    """Write a 0600 file, whole or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.unlink(missing_ok=True)
    with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    half.replace(path)
