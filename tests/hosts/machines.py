"""Hosts of a test's own, made of Linux namespaces: each with its network, processes, name, clock and files in memory.

Every host has one cable to the database's network, from which it reaches the other hosts; nothing of it is seen by the
machine that the tests run on. Needs root. Invariant: what runs on a host ends with its block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("unshare", "nsenter", "ip", "mount", "setpriv", "bash")
# The nearest that namespaces have to clocks of their own: those that count from the start of the machine.
UPTIME_S = 1_000_000
# The next process on a host has the number after this, so that the workers of all hosts have the same.
BEFORE_PID = 4999
_APART = ["--net", "--pid", "--uts", "--ipc", "--mount"]
_BOOT = """
set -e
hostname "$1"
mount -t proc proc /proc
mount --bind /tmp /mnt
mount -t tmpfs tmp /tmp
for kept in "${@:2}"; do
  case $kept in /tmp/*) mkdir -p "$kept"; mount --bind "/mnt/${kept#/tmp/}" "$kept" ;; esac
done
umount -l /mnt
mount -t tmpfs shm /dev/shm
ip link set lo up
echo ready
exec sleep infinity
"""
_RUN = """
cd "$1"
echo "$2" > /proc/sys/kernel/ns_last_pid
"${@:3}" &
wait $!
"""


@cache
def _obstacle() -> str | None:
    """Tell why hosts cannot be made here; None where they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing (Debian, Ubuntu: apt-get install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "namespaces with cables between them need root"
    words = "ip link add mp0 type veth peer name mp1 && mount -t tmpfs x /mnt && hostname x"
    tried = subprocess.run(
        ["unshare", *_APART, "--time", "--boottime", "1", "--fork", "bash", "-c", words],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"namespaces are refused: {tried.stderr.strip()}"


def need_hosts() -> None:
    """Skip where hosts cannot be made; in CI a missing program is a failure, since CI installs them."""
    obstacle = _obstacle()
    if obstacle is not None and "missing" in obstacle and os.environ.get("CI"):
        pytest.fail(obstacle)
    if obstacle is not None:
        pytest.skip(f"NOT TESTED ON SEVERAL HOSTS: {obstacle}")


def _ip(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *words], check=True)


@dataclass
class Host:
    """One host: what runs there, its files, its cable."""

    name: str
    number: int
    init: int
    network: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    clock: dict[str, str] = field(default_factory=dict)

    @property
    def database(self) -> str:
        """The database's address on this host's cable."""
        return f"10.99.{self.number}.1"

    @property
    def address(self) -> str:
        """The host's own address."""
        return f"10.99.{self.number}.2"

    def path(self, path: str) -> Path:
        """Return a file of the host as it is seen from outside."""
        return Path(f"/proc/{self.init}/root{path}")

    def start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program there; its errors go to the host's file /tmp/log."""
        inside = ["nsenter", "-t", str(self.init), "-n", "-p", "-u", "-i", "-m", "-T"]
        with self.path("/tmp/log").open("ab") as log:
            process = subprocess.Popen(
                [*inside, "bash", "-c", _RUN, "run", str(ROOT), str(BEFORE_PID), *command],
                env={**environment, **self.clock},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.running.append(process)
        return process

    def set_ahead(self, seconds: int) -> None:
        """Set the wall clock of what is started from now on ahead; does nothing where there is no C compiler."""
        source = Path(__file__).with_name("clock.c")
        if shutil.which("cc") is not None:
            library = ["-shared", "-fPIC", "-o", self.path("/tmp/clock.so"), source, "-ldl"]
            subprocess.run(["cc", *library], check=True)
            self.clock = {"LD_PRELOAD": "/tmp/clock.so", "AHEAD_S": str(seconds)}

    def cut_off(self) -> None:
        """Take the cable out: nothing is refused, nothing arrives."""
        _ip(self.network, "link", "set", f"to-{self.name}", "down")

    def connect(self) -> None:
        """Put the cable back."""
        _ip(self.network, "link", "set", f"to-{self.name}", "up")

    def processes(self) -> list[psutil.Process]:
        """Return what was started there and what that has started."""
        alive = [one.pid for one in self.running if one.poll() is None]
        return [child for pid in alive for child in psutil.Process(pid).children(recursive=True)]

    def said(self) -> str:
        """Return the end of what its programs said."""
        log = self.path("/tmp/log")
        return log.read_text()[-6000:] if log.exists() else ""


@dataclass
class Network:
    """The network of the database, and how to run a program in it."""

    pid: int

    def command(self, user: int, *words: str | Path) -> list[str]:
        """Return a command that runs in this network as a user without rights there."""
        return [
            "nsenter", f"--net=/proc/{self.pid}/ns/net", "setpriv", f"--reuid={user}", f"--regid={user}",
            "--clear-groups", *map(str, words),
        ]  # fmt: skip


@contextmanager
def network() -> Iterator[Network]:
    """Make a network of its own that passes packets on between its cables."""
    process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        _until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        _ip(process.pid, "link", "set", "lo", "up")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net", "bash", "-c", forward]
        subprocess.run(inside, check=True)
        yield Network(process.pid)
    finally:
        process.kill()
        process.wait()


@contextmanager
def host(name: str, number: int, at: Network) -> Iterator[Host]:
    """Make a host with a cable to a network."""
    clocks = ["--time", "--boottime", str(number * UPTIME_S), "--monotonic", str(number * UPTIME_S)]
    process = subprocess.Popen(
        ["unshare", *_APART, *clocks, "--fork", "--kill-child", "--", "bash", "-c", _BOOT, "boot"]
        + [name, str(ROOT), sys.prefix],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        [init] = psutil.Process(process.pid).children()
        made = Host(name, number, init.pid, at.pid)
        _lay_cable(made)
        yield made
        print(f"--- {name}\n{made.said()}")
    finally:
        process.kill()  # the kernel ends what is left on the host, and with it who waits for that
        process.wait()
    for one in made.running:
        one.wait()


def _lay_cable(host: Host) -> None:
    end = f"to-{host.name}"
    peer = ("peer", "name", "eth0", "netns", str(host.init))
    _ip(host.network, "link", "add", end, "type", "veth", *peer)
    for pid, address, device in (
        (host.network, host.database, end),
        (host.init, host.address, "eth0"),
    ):
        _ip(pid, "address", "add", f"{address}/30", "dev", device)
        _ip(pid, "link", "set", device, "up")
    _ip(host.init, "route", "add", "default", "via", host.database)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
