"""The seal: what opens, what does not, and the key file."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest

from millpond.errors import InvalidInput, Permanent
from millpond.identity.seal import KEY_BYTES, Seal

KEY = bytes(range(KEY_BYTES))


def test_sealed_bytes_open_with_the_same_words() -> None:
    seal = Seal(KEY)
    assert seal.open(seal.seal(b"secret", "signing_key", "k1"), "signing_key", "k1") == b"secret"


def test_sealing_twice_gives_different_bytes() -> None:
    seal = Seal(KEY)
    assert seal.seal(b"secret", "a") != seal.seal(b"secret", "a")


@pytest.mark.parametrize("words", [("signing_key", "k2"), ("signing_key",), ("signing_keyk1",), ()])
def test_other_words_do_not_open(words: tuple[str, ...]) -> None:
    seal = Seal(KEY)
    sealed = seal.seal(b"secret", "signing_key", "k1")
    with pytest.raises(Permanent, match="does not open"):
        seal.open(sealed, *words)


def test_another_key_does_not_open() -> None:
    sealed = Seal(KEY).seal(b"secret", "a")
    with pytest.raises(Permanent):
        Seal(KEY[::-1]).open(sealed, "a")


@pytest.mark.parametrize("index", [0, 1, 14, -1])
def test_a_changed_byte_does_not_open(index: int) -> None:
    seal = Seal(KEY)
    sealed = bytearray(seal.seal(b"secret", "a"))
    sealed[index] ^= 1
    with pytest.raises(Permanent):
        seal.open(bytes(sealed), "a")


@pytest.mark.parametrize("sealed", [b"", b"\x01", b"\x01short"])
def test_a_stump_does_not_open(sealed: bytes) -> None:
    with pytest.raises(Permanent):
        Seal(KEY).open(sealed, "a")


def test_text_key_in_both_base64_alphabets() -> None:
    key = b"\xfb\xff" * 16
    standard = Seal.from_text(base64.b64encode(key).decode())
    url = Seal.from_text(base64.urlsafe_b64encode(key).decode().rstrip("="))
    assert standard.key_id == url.key_id == Seal(key).key_id


@pytest.mark.parametrize("text", ["", "short", "not base64 at all!", "YWJj"])
def test_a_bad_text_key_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Seal.from_text(text)
    assert caught.value.param == "MILLPOND_SECRET_KEY"


def test_neither_repr_nor_key_id_tells_the_key() -> None:
    seal = Seal(KEY)
    assert KEY.hex() not in repr(seal) + seal.key_id
    assert base64.b64encode(KEY).decode() not in repr(seal)


def test_key_file_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secret.key"
    first = Seal.from_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Seal.from_file(path).key_id == first.key_id
    assert [entry.name for entry in path.parent.iterdir()] == ["secret.key"]


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    Seal.from_file(path)
    path.chmod(0o644)
    with pytest.raises(Permanent, match="can be read by others"):
        Seal.from_file(path)


def test_processes_that_start_together_share_one_key_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    barrier = threading.Barrier(8)
    ids: list[str] = []

    def start() -> None:
        barrier.wait()
        ids.append(Seal.from_file(path).key_id)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert os.listdir(tmp_path) == ["secret.key"]
