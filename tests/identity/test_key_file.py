"""The key file is private, appears whole for all who start together, and loses no key when one is added."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from millpond.errors import InvalidInput, Permanent
from millpond.identity import key_file

FILES = ["secret.key", "secret.key.lock"]


def opened(path: Path) -> list[str]:
    key_file.make(path)
    return [seal.key_id for seal in key_file.read(path)]


def test_key_file_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secret.key"
    first = opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert opened(path) == first
    assert sorted(os.listdir(path.parent)) == FILES


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    opened(path)
    path.chmod(0o644)
    with pytest.raises(Permanent, match="can be read by others"):
        opened(path)


def test_processes_that_start_together_share_one_key_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    barrier = threading.Barrier(8)
    ids: list[str] = []

    def start() -> None:
        barrier.wait()
        ids.append(opened(path)[0])

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_new_key_stands_before_the_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    [first] = opened(path)
    second = key_file.add(path).key_id
    third = key_file.add(path).key_id
    assert opened(path) == [third, second, first]
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == FILES


def test_keys_that_are_added_together_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    [first] = opened(path)
    code = """
import sys; from pathlib import Path; from millpond.identity import key_file
sys.stdin.readline()
for _ in range(25): print(key_file.add(Path(sys.argv[1])).key_id)
"""
    adds = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for one in adds:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    added = [key_id for one in adds for key_id in one.communicate(timeout=60)[0].split()]
    assert len(added) == 100
    assert set(opened(path)) == {first, *added}
    assert len(opened(path)) == 101


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(InvalidInput, match="holds no key"):
        key_file.read(path)
