"""The set-up script: says what is missing, does nothing when nothing changed, starts over when moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = ["pyproject.toml", "constraints.txt", "requirements-local.txt", "scripts/setup"]


def run(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up script of a clone."""
    return subprocess.run(
        [place / "scripts" / "setup", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def clone(root, tmp_path):
    """Return a folder with what the set-up script reads."""
    (tmp_path / "scripts").mkdir()
    for name in INPUTS:
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def interpreter(tmp_path):
    """Return a function that makes an interpreter which lacks modules or calls itself older."""

    def make(*, lacks: str = "", version: str = "") -> str:
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        if lacks:
            (hidden / f"{lacks}.py").write_text("raise ImportError\n")
        if version:
            (hidden / "sitecustomize.py").write_text(f"import sys\nsys.version_info = {version}\n")
        program = tmp_path / "python-of-the-test"
        program.write_text(f'#!/bin/sh\nPYTHONPATH="{hidden}" exec "{sys.executable}" "$@"\n')
        program.chmod(0o755)
        return str(program)

    return make


def test_a_python_without_venv_is_named_with_what_to_install(clone, interpreter):
    done = run(clone, PYTHON=interpreter(lacks="ensurepip"))
    assert done.returncode == 1
    assert "lacks its venv module" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_is_too_old_is_named(clone, interpreter):
    done = run(clone, PYTHON=interpreter(version="(3, 10, 4)"))
    assert done.returncode == 1
    assert "3.10 is too old" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_python_at_all_is_said(clone):
    done = run(clone, PYTHON="python-that-is-not-there")
    assert done.returncode == 1
    assert "Python 3.11 or newer with its venv module is needed" in done.stderr


def test_a_failed_installation_shows_why_and_is_not_taken_for_done(clone):
    (clone / "constraints.txt").write_text("hatchling==0.0.0.dev0\n")
    done = run(clone, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "installing failed" in done.stderr
    assert "hatchling" in done.stderr
    assert not (clone / ".venv" / "millpond-setup").exists()


@pytest.mark.skipif(
    not (Path(sys.prefix) / "millpond-setup").exists(), reason="runs in the clone's own .venv only"
)
def test_a_second_run_does_nothing(root):
    assert run(root, "dev").returncode == 0
    stamp = Path(sys.prefix) / "millpond-setup"
    before = stamp.stat().st_mtime_ns
    done = run(root, "dev")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stamp.stat().st_mtime_ns == before
