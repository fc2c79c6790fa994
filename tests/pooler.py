"""PgBouncer in transaction mode before a test server, for the tests behind a pooler.

From 1.21 on it carries prepared statements. Debian 12 has 1.18, so `scripts/pooler` builds a newer one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from millpond.db.embedded import Urls

PORT = 6432
CARRIES = (1, 21)
_BUILT = Path(__file__).resolve().parents[1] / "build" / "pooler"


def binary() -> str:
    """Return the pooler that was built, or the distribution's."""
    path = os.pathsep.join((str(_BUILT), os.environ.get("PATH", ""), "/usr/sbin"))
    found = shutil.which("pgbouncer", path=path)
    if found is None and os.environ.get("CI"):
        pytest.fail("pgbouncer is missing, which CI installs")
    if found is None:
        pytest.skip("pgbouncer is not installed: scripts/pooler, or CI=1 scripts/system-packages")
    return found


@cache
def version() -> tuple[int, ...]:
    """Return the pooler's version."""
    told = subprocess.run([binary(), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"PgBouncer (\d+)\.(\d+)", told.stdout)
    assert found is not None
    return tuple(map(int, found.groups()))


def need_statements_carried() -> None:
    """Skip where the pooler loses prepared statements."""
    if version() < CARRIES:
        found = ".".join(map(str, version()))
        pytest.skip(f"PgBouncer {found} loses prepared statements, scripts/pooler builds another")


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledUrls(Urls):
    """Addresses through the pooler; `direct` has those that LISTEN needs."""

    direct: Urls


def direct(urls: Urls) -> Urls:
    """Return the addresses that lead to Postgres itself."""
    return urls.direct if isinstance(urls, PooledUrls) else urls


@dataclass
class Pooler:
    """One PgBouncer: started, killed and started again on the same socket."""

    place: Path
    user: int | None
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def before(cls, urls: Urls, place: Path, *, size: int = 4) -> Pooler:
        """Set one up before the server of these addresses, for every database of its."""
        socket = parse_qs(urlsplit(urls.app).query)["host"][0]
        people = [urlsplit(url) for url in (urls.app, urls.engine)]
        lines = [f'"{one.username}" "{one.password}"\n' for one in people]
        (place / "users").write_text("".join(lines))
        more = "max_prepared_statements = 100\n" if version() >= CARRIES else ""
        (place / "ini").write_text(
            f"[databases]\n* = host={socket}\n[pgbouncer]\n"
            f"listen_addr =\nlisten_port = {PORT}\nunix_socket_dir = {place}\n"
            f"auth_type = scram-sha-256\nauth_file = {place / 'users'}\n"
            f"pool_mode = transaction\ndefault_pool_size = {size}\nlogfile = {place / 'log'}\n{more}"
        )
        # The server's socket stands in a folder that only its own user may enter.
        user = os.stat(socket).st_uid if os.geteuid() == 0 else None
        if user is not None:
            for path in (place, *place.iterdir()):
                os.chown(path, user, -1)
        return cls(place, user)

    def urls(self, urls: Urls) -> PooledUrls:
        """Return the same addresses through this pooler; the owner's stays direct, as for migrations."""
        return PooledUrls(
            owner=urls.owner,
            app=self._through(urls.app),
            engine=self._through(urls.engine),
            direct=urls,
        )

    def _through(self, url: str) -> str:
        one = urlsplit(url)
        return (
            f"postgresql://{one.username}:{one.password}@{one.path}?host={self.place}&port={PORT}"
        )

    def start(self) -> None:
        """Start it, and wait until it can be reached."""
        socket = self.place / f".s.PGSQL.{PORT}"
        socket.unlink(missing_ok=True)  # a killed one leaves it
        self.process = subprocess.Popen(
            [binary(), self.place / "ini"],
            stderr=subprocess.DEVNULL,
            user=self.user,
            cwd=self.place,
        )
        until = time.monotonic() + 20
        while not socket.exists():
            assert time.monotonic() < until, (self.place / "log").read_text()
            time.sleep(0.02)

    def end_in_order(self) -> None:
        """Let transactions that are under way end, and refuse new ones meanwhile."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)

    def kill(self) -> None:
        """End it at once, with every connection through it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it, and print the end of its log for whoever reads a failure."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        print((self.place / "log").read_text()[-2000:])


@contextmanager
def place() -> Iterator[Path]:
    """A folder that the pooler's user owns, with a short path for its socket."""
    path = Path(tempfile.mkdtemp(prefix="mp-pool-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def pooled(urls: Urls, place: Path, *, size: int = 4) -> Iterator[PooledUrls]:
    """Run a pooler before the server of these addresses; yields those through it."""
    pooler = Pooler.before(urls, place, size=size)
    pooler.start()
    try:
        yield pooler.urls(urls)
    finally:
        pooler.stop()
