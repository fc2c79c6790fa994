"""What an upload may be: file names, sizes and media types.

Pure. Called by `store` before anything is stored. Invariant: a type is believed only when name and
first bytes agree.
"""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from millpond.errors import InvalidInput

MAX_BYTES = 20 * 1024 * 1024
MAX_NAME = 512
TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
}
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or Office file",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x1f\x8b": "a compressed file",
    b"\x7fELF": "a program",
}
_BOMS = (b"\xff\xfe", b"\xfe\xff")


def check_filename(filename: str) -> str:
    """Return the name in its one stored form: a relative path with `/`, NFC.

    Raises InvalidInput for names that are empty, too long, absolute, or climb.
    """
    name = unicodedata.normalize("NFC", filename).strip()
    if not name or len(name) > MAX_NAME:
        raise InvalidInput(f"A file name has 1 to {MAX_NAME} characters.", param="filename")
    if "\\" in name or any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise InvalidInput(
            "A file name holds no backslash and no control character.", param="filename"
        )
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidInput(
            "A file name is a relative path without empty parts, `.` or `..`.", param="filename"
        )
    return name


def media_type(filename: str, content: bytes) -> str:
    """Return the media type that the name's ending says, once the content agrees.

    Raises InvalidInput (`empty`, `too_large`, `unsupported_type`, `type_mismatch`).
    """
    if not content.strip():
        raise InvalidInput(f"{filename} is empty.", param="content", code="empty")
    if len(content) > MAX_BYTES:
        raise InvalidInput(
            f"{filename} has {len(content)} bytes; at most {MAX_BYTES} are accepted.",
            param="content",
            code="too_large",
        )
    suffix = PurePosixPath(filename).suffix.lower()
    media = TYPES.get(suffix)
    if media is None:
        raise InvalidInput(
            f"{filename} is of a kind that cannot be read; accepted are {', '.join(TYPES)}.",
            param="filename",
            code="unsupported_type",
        )
    problem = _mismatch(media, content)
    if problem is not None:
        raise InvalidInput(
            f"{filename} {problem}, though its name ends in {suffix}.",
            param="content",
            code="type_mismatch",
        )
    return media


def _mismatch(media: str, content: bytes) -> str | None:
    is_pdf = b"%PDF-" in content[:1024]
    if media == "application/pdf":
        return None if is_pdf else "is not a PDF"
    if content.startswith(b"%PDF-"):
        return "is a PDF"
    for magic, what in _FOREIGN.items():
        if content.startswith(magic):
            return f"is {what}"
    if b"\x00" in content[:8192] and not content.startswith(_BOMS):
        return "holds binary data"
    return None
