"""Text becomes spans: chunks of a size that an embedder reads whole, cut where the text itself parts.

Pure; called in the child process (`reader_child`). Invariant: `text[start:end]` is the chunk, spans
ascend and do not overlap.
"""

from __future__ import annotations

from semantic_text_splitter import MarkdownSplitter, TextSplitter

# Characters. all-MiniLM-L6-v2 reads 256 tokens, about 1,000 characters of English with a title.
CHUNK_CHARS = (250, 800)
MAX_CHUNKS = 20_000

Span = tuple[int, int]


def spans(media: str, text: str) -> list[Span]:
    """Return the chunks of `text` as (start, end) in characters, headings kept with what follows."""
    is_structured = media in ("text/markdown", "text/html")
    splitter = (MarkdownSplitter if is_structured else TextSplitter)(CHUNK_CHARS)
    found = [(start, start + len(chunk)) for start, chunk in splitter.chunk_indices(text) if chunk]
    return _with_headings(text, found) if is_structured else found


def _with_headings(text: str, found: list[Span]) -> list[Span]:
    """Join a chunk that is nothing but headings to the one after it, as far as a chunk may grow."""
    joined: list[Span] = []
    pending: int | None = None
    previous_end = 0
    for start, end in found:
        if pending is not None and end - pending > sum(CHUNK_CHARS):
            joined.append((pending, previous_end))
            pending = None
        previous_end = end
        first = start if pending is None else pending
        lines = [line for line in text[start:end].splitlines() if line.strip()]
        if lines and all(line.lstrip().startswith("#") for line in lines):
            pending = first
            continue
        joined.append((first, end))
        pending = None
    if pending is not None:
        joined.append((pending, found[-1][1]))
    return joined
