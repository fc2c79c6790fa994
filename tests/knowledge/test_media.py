"""What an upload may be."""

from __future__ import annotations

import pytest

from millpond.errors import InvalidInput
from millpond.knowledge import media


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.md", b"# A", "text/markdown"),
        ("A.MARKDOWN", b"# A", "text/markdown"),
        ("folder/a.txt", b"a", "text/plain"),
        ("a.htm", b"<p>a", "text/html"),
        ("a.pdf", b"%PDF-1.7 ...", "application/pdf"),
        ("utf16.txt", "\ufeffabc".encode("utf-16"), "text/plain"),
    ],
)
def test_type_follows_name_and_content(name: str, content: bytes, expected: str) -> None:
    assert media.media_type(name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.md", b"", "empty"),
        ("a.md", b" \n\t ", "empty"),
        ("a.md", b"x" * (media.MAX_BYTES + 1), "too_large"),
        ("a.exe", b"MZ", "unsupported_type"),
        ("noending", b"text", "unsupported_type"),
        ("a.docx", b"PK\x03\x04", "unsupported_type"),
        ("a.pdf", b"hello", "type_mismatch"),
        ("a.txt", b"%PDF-1.7", "type_mismatch"),
        ("a.md", b"PK\x03\x04rest", "type_mismatch"),
        ("a.txt", b"abc\x00def", "type_mismatch"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_code(name: str, content: bytes, code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        media.media_type(name, content)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["a.md", "folder/b c.pdf", "Ü.txt", ".hidden.md"])
def test_plain_names_pass(name: str) -> None:
    assert media.check_filename(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "/etc/a.md",
        "../a.md",
        "a/../b.md",
        "a//b.md",
        "./a.md",
        "a\\b.md",
        "a\x00.md",
        "a\n.md",
    ],
)
def test_names_that_climb_or_hide_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        media.check_filename(name)
    assert caught.value.param == "filename"


def test_names_are_stored_in_one_form() -> None:
    assert media.check_filename("u\u0308.md") == "\u00fc.md"
