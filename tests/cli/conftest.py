"""Fixtures of the command line's tests: a real `millpond up` and commands run against it.

Invariant: every process that a test starts is gone after it, also when the test fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from millpond.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
FLOWS = "tests.cli.sample_flows"


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment without Millpond's settings, so that those of a developer do not matter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
    return {**kept, "NO_COLOR": "1", **extra}


@dataclass
class Up:
    """A running `millpond up`: its process, data folder, and what it said when it was ready."""

    process: subprocess.Popen[str]
    data_dir: Path
    log: Path
    url: str = ""
    token_file: str = ""
    worker_pid: int = 0
    worker_pids: tuple[int, ...] = ()
    api_pid: int = 0

    @classmethod
    def start(cls, data_dir: Path, *, flows: str = FLOWS, **environment: str) -> Up:
        """Start it on a free port and return when it is ready."""
        log = data_dir.parent / "up.log"
        command = [sys.executable, "-m", "millpond.cli", "up", "--json", "--port", "0"]
        command += ["--data-dir", str(data_dir), "--flows", flows]
        with log.open("a") as stderr:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean_environment(**environment),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        up = cls(process, data_dir, log)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it did not start:\n{log.read_text()[-4000:]}"
        for name, value in json.loads(line).items():
            setattr(up, name, value)
        return up

    def members(self) -> list[psutil.Process]:
        """Every process below it, and its Postgres."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [*below, *self.postgres()]

    def postgres(self) -> list[psutil.Process]:
        """The postmaster of its data folder, if it lives."""
        try:
            pid = (self.data_dir / "postgres/data/postmaster.pid").read_text().split("\n")[0]
            return [psutil.Process(int(pid))]
        except (FileNotFoundError, psutil.NoSuchProcess):
            return []

    def stop(self) -> int:
        """End it in order; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def destroy(self) -> None:
        """End whatever is left of it."""
        try:
            left = self.members()
        except psutil.NoSuchProcess:
            left = self.postgres()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in left:
            if process.is_running():
                process.kill()
        psutil.wait_procs(left, timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()


def make_folder() -> Path:
    """A folder that the database's system user can reach when tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-cli-"))
    folder.chmod(0o711)
    return folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for one test."""
    made = make_folder()
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def started(folder: Path) -> Iterator[Callable[..., Up]]:
    """Start `millpond up` processes that are gone after the test."""
    ups: list[Up] = []

    def start(**environment: str) -> Up:
        ups.append(Up.start(folder / "data", **environment))
        return ups[-1]

    yield start
    for up in ups:
        up.destroy()


@pytest.fixture(scope="package")
def up() -> Iterator[Up]:
    """One `millpond up` that tests share as long as they do not end it."""
    made = make_folder()
    running = Up.start(made / "data")
    try:
        yield running
        assert running.stop() == 0
    finally:
        running.destroy()
        shutil.rmtree(made, ignore_errors=True)


def run_command(*arguments: str, stdin: str | None = None, **environment: str) -> Result:
    """Run a command in this process, with its own stdout and stderr."""
    cleared: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith("MILLPOND_")
    }
    given = {**cleared, "NO_COLOR": "1", **environment}
    return CliRunner().invoke(app, list(arguments), input=stdin, env=given)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run commands that need no server."""
    return run_command


@pytest.fixture
def cli(up: Up) -> Callable[..., Result]:
    """Run commands against the shared server."""

    def run(*arguments: str, stdin: str | None = None, **environment: str) -> Result:
        place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
        return run_command(*arguments, stdin=stdin, **{**place, **environment})

    return run


@pytest.fixture
def cli_json(cli: Callable[..., Result]) -> Callable[..., Any]:
    """Run a command with --json and return the document that it printed."""

    def run(*arguments: str, stdin: str | None = None) -> Any:
        result = cli(*arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run
