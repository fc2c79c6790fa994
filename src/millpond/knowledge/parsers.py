"""Bytes become text: Markdown, plain text, HTML, PDF.

Pure but for memory; called in the child process only (`reader_child`), since what it reads is anyone's.
Invariant: the text returned is what is stored, so that spans of it hold for ever.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from millpond.errors import InvalidInput

MAX_CHARS = 5_000_000
_MAX_TITLE = 300
MAX_PAGES = 3_000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_BLANKS = re.compile(r"\n[ \t]*\n[ \t\n]*")
_FIRST_HEADING = re.compile(r"^#[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)
_HYPHEN_AT_LINE_END = re.compile("\ufffe\n?|\u00ad\n?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """The text of a document, its title if it says one, and where its pages start (PDF only)."""

    text: str
    title: str | None
    page_starts: tuple[int, ...] = ()


def parse(media: str, content: bytes) -> Parsed:
    """Return the text of a document; raises InvalidInput when it has none that can be read."""
    parsed = _PARSERS[media](content)
    if not parsed.text.strip():
        raise InvalidInput(
            "The document holds no text (a scan needs text recognition first).", code="no_text"
        )
    if len(parsed.text) > MAX_CHARS:
        raise InvalidInput(
            f"The document holds {len(parsed.text)} characters; at most {MAX_CHARS} are accepted.",
            code="too_large",
        )
    return parsed


def _tidy(text: str) -> str:
    """Unify line ends and drop control characters, which Postgres or a terminal could not take."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _decode(content: bytes) -> str:
    for bom, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if content.startswith(bom):
            return _decode_as(content, encoding)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return _decode_as(content, "cp1252")


def _decode_as(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidInput(
            "The document's characters are in no known encoding; save it as UTF-8.",
            code="unknown_encoding",
        ) from error


def _parse_text(content: bytes) -> Parsed:
    return Parsed(text=_tidy(_decode(content)), title=None)


def _parse_markdown(content: bytes) -> Parsed:
    text = _tidy(_decode(content))
    heading = _FIRST_HEADING.search(text)
    return Parsed(text=text, title=heading.group(1) if heading else None)


_SKIPPED = ("script", "style", "noscript", "template", "svg", "iframe", "object", "head", "nav")
_BLOCK_TAGS = """
    address article aside blockquote dd details div dl dt fieldset figcaption figure footer form
    header hr li main ol p pre section summary table tr ul br
"""
_BLOCKS = frozenset(_BLOCK_TAGS.split())


def _parse_html(content: bytes) -> Parsed:
    """Write the visible text, headings as `#` lines and list items as `-` lines, so that it splits well."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(_decode(content))
    title_node = tree.css_first("title")
    title = _title(title_node.text()) if title_node is not None else None
    for node in tree.css(", ".join(_SKIPPED)):
        node.decompose()
    body = tree.body
    parts: list[str] = []
    if body is not None:
        for node in body.traverse(include_text=True):
            parts.append(_html_part(node))
    text = _squeeze("".join(parts))
    heading = _FIRST_HEADING.search(text)
    return Parsed(text=text, title=title or (heading.group(1) if heading else None))


def _html_part(node: Any) -> str:
    tag = node.tag
    if tag == "-text":
        return _after(node) + re.sub(r"\s+", " ", node.text_content or "")
    if tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
        return f"\n\n{'#' * int(tag[1])} "
    if tag == "li":
        return "\n- "
    if tag in ("td", "th"):
        return " | " if node.prev is not None else ""
    return "\n\n" if tag in _BLOCKS - {"br", "tr"} else "\n" if tag in _BLOCKS else ""


def _after(node: Any) -> str:
    """Break the line before text that follows the end of a block."""
    previous = node.prev
    is_after_block = previous is not None and (
        previous.tag in _BLOCKS - {"br"} or previous.tag in ("h1", "h2", "h3", "h4", "h5", "h6")
    )
    return "\n\n" if is_after_block else ""


def _squeeze(text: str) -> str:
    lines = (re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in _tidy(text).split("\n"))
    return _BLANKS.sub("\n\n", "\n".join(lines)).strip() + "\n"


def _title(raw: str) -> str | None:
    """Return what may be stored of a title that a document gives itself."""
    return _tidy(raw).strip()[:_MAX_TITLE] or None


def _parse_pdf(content: bytes) -> Parsed:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise InvalidInput(
                "The PDF is encrypted; upload it without a password.", code="encrypted"
            ) from error
        raise InvalidInput("The PDF is damaged and cannot be read.", code="damaged") from error
    if len(document) > MAX_PAGES:
        raise InvalidInput(
            f"The PDF has {len(document)} pages; at most {MAX_PAGES} are accepted.",
            code="too_large",
        )
    text, starts = "", []
    for page in document:
        starts.append(len(text))
        text += _page_text(page.get_textpage().get_text_range()) + "\n\n"
        if len(text) > MAX_CHARS:
            break
    try:
        title = _title(document.get_metadata_dict().get("Title", ""))
    except UnicodeDecodeError:
        title = None
    return Parsed(text=text, title=title, page_starts=tuple(starts))


_STARTS_ANEW = re.compile(r"(\d+(\.\d+)*[.)]?|[•‣▪*–-])\s")
# A line this full, against the fuller lines of its page, was wrapped by the layout and goes on below.
_WRAPPED = 0.75


def _page_text(raw: str) -> str:
    """Undo the layout of a page: join words and lines that it broke, part paragraphs by blank lines."""
    text = _tidy(_HYPHEN_AT_LINE_END.sub("", raw.replace("\r\n", "\n")))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return ""
    width = sorted(len(line) for line in lines)[len(lines) * 9 // 10]
    out = lines[0]
    for above, line in pairwise(lines):
        goes_on = len(above) >= width * _WRAPPED and not _STARTS_ANEW.match(line)
        out += (" " if goes_on else "\n\n") + line
    return out


_PARSERS = {
    "text/plain": _parse_text,
    "text/markdown": _parse_markdown,
    "text/html": _parse_html,
    "application/pdf": _parse_pdf,
}
