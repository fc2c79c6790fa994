"""The seal: what opens, what does not, and the key file."""

from __future__ import annotations

import base64

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
