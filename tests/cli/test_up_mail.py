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

import pytest
from tests.cli.conftest import FLOWS, ROOT, clean_environment

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
        return self._shown.decode().replace("\r\n", "\n")

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


def invite(invoke, url, data_dir, to):
    place = {"MILLPOND_URL": url, "MILLPOND_DATA_DIR": str(data_dir)}
    result = invoke("invitations", "send", to, **place)
    assert result.exit_code == 0, result.stderr


def mailed(data_dir, to):
    """Wait for a mail in the file; returns the token of its link."""
    path, until = data_dir / "mail.txt", time.monotonic() + 30
    while time.monotonic() < until:
        text = path.read_text().replace("=\n", "") if path.exists() else ""
        if f"To: {to}" in text and (found := re.search(r"#token=(?:3D)?([\w.~-]+)", text)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"no mail to {to}")


def test_the_link_of_an_invitation_is_shown_on_the_terminal(terminal, invoke):
    url = terminal.find(r"Millpond +(http\S+)")
    terminal.find(r"(token file)")
    invite(invoke, url, terminal.data_dir, "ann@acme.example")
    link = terminal.find(r"mail +(http\S+#token=\S+)  \(to ann@acme.example: ")
    assert link.startswith(f"{url}/invitation#token=")
    assert link.endswith(mailed(terminal.data_dir, "ann@acme.example"))
    assert link.partition("#")[2] not in terminal.log.read_text()


def test_where_stdout_is_no_terminal_no_link_is_shown(folder, invoke):
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
        invite(invoke, url, data_dir, "bob@acme.example")
        token = mailed(data_dir, "bob@acme.example")
    finally:
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=60)
    assert "token file" in shown
    assert token not in shown
    assert token not in log.read_text()
