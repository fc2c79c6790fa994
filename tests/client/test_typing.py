"""The client is typed as its users see it: `typing_sample.py` passes mypy in strict mode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "typing_sample.py"


def checked(root: Path, file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(file)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_what_the_client_gives_is_known_to_a_type_checker(root: Path) -> None:
    done = checked(root, SAMPLE)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_check_would_notice_an_untyped_call(root: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from millpond.client import Client\nnumber: int = Client().runs.start('f')\n",
        encoding="utf-8",
    )
    done = checked(root, wrong)
    assert 'expression has type "Run"' in done.stdout
