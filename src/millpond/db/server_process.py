"""The server's process: find one left behind, start one, stop one.

Called by `embedded` alone, with its lock held. Invariant: never two postmasters on one cluster, and
no signal goes to a process that is not a Postgres with this cluster as its working directory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from millpond.db.server_home import SOCKET_FILE, ServerHome
from millpond.errors import Permanent

# A fast shutdown writes a checkpoint; past this the server is cut and recovers at its next start.
STOP_FAST_S = 60.0
STOP_IMMEDIATE_S = 10.0
ORPHANS_END_S = 3.0
LOG_MAX_BYTES = 10 * 1024 * 1024
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Server:
    """A postmaster: our child, or one left by an earlier process (`child` is None)."""

    process: psutil.Process
    child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether the postmaster still runs; reaps it when it is our child."""
        if self.child is not None:
            return self.child.poll() is None
        return _is_live(self.process)

    def was_started_by(self, command: Sequence[str]) -> bool:
        """Whether this server has the same binary, folders and options as `command`."""
        try:
            return self.process.cmdline() == list(command)
        except psutil.Error:
            return False


def find_server(home: ServerHome) -> Server | None:
    """Return the live postmaster of this cluster, or None after clearing what a dead one left.

    Backends that outlive their postmaster still write shared memory, so they are ended first.
    """
    pid_file = home.cluster / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        pid = 0
    if pid > 0 and (process := _postgres_in(pid, home.cluster)) is not None:
        return Server(process)
    orphans = [_postgres_in(pid, home.cluster) for pid in psutil.pids()]
    _end([process for process in orphans if process is not None])
    # Their numbers may be another process's by now, for which Postgres would refuse to start.
    for stale in (pid_file, home.sockets / f"{SOCKET_FILE}.lock"):
        stale.unlink(missing_ok=True)
    return None


def _postgres_in(pid: int, cluster: Path) -> psutil.Process | None:
    """Return the process `pid` if it is a live Postgres that works in `cluster`."""
    try:
        process = psutil.Process(pid)
        if not process.name().startswith("postgres") or not _is_live(process):
            return None
        return process if Path(process.cwd()).resolve() == cluster.resolve() else None
    except (psutil.Error, OSError):
        return None


def _is_live(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait for orphaned backends, which end by themselves, and kill those that do not."""
    _, alive = psutil.wait_procs(list(processes), timeout=ORPHANS_END_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=ORPHANS_END_S)


def command_line(binaries: Path, home: ServerHome, options: Mapping[str, str]) -> list[str]:
    """Return the server's command, which is also the mark that a server left behind is known by."""
    command = [str(binaries / "postgres"), "-D", str(home.cluster), "-k", str(home.sockets)]
    for name, value in sorted(options.items()):
        command += ["-c", f"{name}={value}"]
    return command


def _environment() -> dict[str, str]:
    """Return an environment without the caller's PG* variables, locale and time zone."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _popen(
    command: Sequence[str], home: ServerHome, output: int, *, own_session: bool = False
) -> subprocess.Popen[bytes]:
    """Start a program of the server as the server's user, with no rights for anyone else."""
    account = home.account
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
        umask=0o077,
        cwd="/",
        env=_environment(),
        start_new_session=own_session,
    )


def initialise(binaries: Path, home: ServerHome, is_durable: bool) -> None:
    """Run initdb with scram for every connection; the cluster appears whole or not at all."""
    half = home.root / "data.new"
    if half.exists():
        shutil.rmtree(half)
    half.mkdir(mode=0o700)
    home.own(half)
    secret = home.sockets / "superuser"
    secret.unlink(missing_ok=True)
    secret.touch(mode=0o600)
    secret.write_text(home.password("superuser"), encoding="ascii")
    home.own(secret)
    command = [str(binaries / "initdb"), "-D", str(half), "--username=postgres"]
    command += ["--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C"]
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    command += [] if is_durable else ["--no-sync"]
    try:
        initdb = _popen(command, home, subprocess.PIPE)
        output, _ = initdb.communicate()
    finally:
        secret.unlink(missing_ok=True)
    if initdb.returncode != 0:
        said = output.decode(errors="replace").strip()[-600:]
        raise Permanent(f"Embedded Postgres could not be set up in {home.root}: {said}")
    half.rename(home.cluster)


def spawn(command: Sequence[str], home: ServerHome) -> Server:
    """Start the server in a session of its own, so that Ctrl-C at a terminal does not reach it."""
    if home.log.exists() and home.log.stat().st_size > LOG_MAX_BYTES:
        home.log.rename(home.log.with_suffix(".log.1"))
    log = os.open(home.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        child = _popen(command, home, log, own_session=True)
    finally:
        os.close(log)
    return Server(psutil.Process(child.pid), child)


async def stop(server: Server) -> None:
    """Shut the server down: rolls back what runs and checkpoints; cuts it when that takes long."""
    for number, patience_s in (
        (signal.SIGINT, STOP_FAST_S),
        (signal.SIGQUIT, STOP_IMMEDIATE_S),
        (signal.SIGKILL, STOP_IMMEDIATE_S),
    ):
        if not server.is_alive():
            return
        try:
            server.process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
        until = time.monotonic() + patience_s
        while server.is_alive() and time.monotonic() < until:
            await asyncio.sleep(POLL_S)
