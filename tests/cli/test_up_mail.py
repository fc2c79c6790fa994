"""Links in mail on the terminal of a development platform: there, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cli.conftest import FLOWS, ROOT, clean_environment, run_command
from tests.cli.founding import found, mailed

pytestmark = [pytest.mark.xdist_group("platform"), pytest.mark.slow]


class Terminal:
    """`millpond up` with a terminal as its stdout: what it shows there, read as it comes."""

    def __init__(self, folder, **environment):
        self.data_dir, self.log = folder / "data", folder / "up.log"
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "millpond.cli", "up", "--port", "0"]
        command += ["--data-dir", str(self.data_dir), "--flows", FLOWS]
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean_environment(COLUMNS="300", **environment),
                stdout=theirs,
                stderr=stderr,
            )
        os.close(theirs)
        self._ours = ours
        self._shown = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while chunk := os.read(self._ours, 4096):
                self._shown += chunk

    @property
    def shown(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", self._shown.decode()).replace("\r\n", "\n")

    def find(self, pattern):
        """Wait until something is shown; returns its first group."""
        until = time.monotonic() + 90
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < until, (self.shown, self.log.read_text()[-3000:])
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return found[1]

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        os.close(self._ours)


@pytest.fixture
def terminal(folder):
    made = Terminal(folder)
    yield made
    made.end()


@dataclass
class Place:
    """Where a platform is, as `found` asks for it."""

    url: str
    data_dir: Path


def token_of_an_invitation(url, data_dir):
    """Let an operator found an org, whose first owner is invited by mail; returns the token of the link."""
    place = Place(url, data_dir)
    found(place, run_command)
    assert stat.S_IMODE((data_dir / "mail.txt").stat().st_mode) == 0o600
    return mailed(place, "ann@acme.example")


def test_the_link_of_an_invitation_is_shown_on_the_terminal(terminal):
    url = terminal.find(r"Millpond +(http\S+)")
    terminal.find(r"(token file)")
    token = token_of_an_invitation(url, terminal.data_dir)
    link = terminal.find(r"mail +(http\S+#token=\S+)  \(to ann@acme.example: ")
    assert link.startswith(f"{url}/invitation#token=")
    assert link.endswith(token)
    assert token not in terminal.log.read_text()


def test_where_stdout_is_no_terminal_no_link_is_shown(folder):
    """Neither in what is written to a pipe nor in the log."""
    data_dir, log = folder / "data", folder / "up.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "millpond.cli",
                "up",
                "--port",
                "0",
                "--data-dir",
                str(data_dir),
            ],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        url = process.stdout.readline().split()[1]
        token = token_of_an_invitation(url, data_dir)
    finally:
        process.send_signal(signal.SIGTERM)
        # Not by `communicate`, which passes over what came with the first line.
        shown = process.stdout.read()
        process.wait(timeout=60)
    assert "token file" in shown
    assert token not in shown
    assert token not in log.read_text()
