"""Has documents parsed and split in a child process with limits.

Called by `steps`. Invariant: whatever a document does to its reader, the worker gets an answer or a
classified error in time, and the process is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millpond.errors import InvalidInput, Permanent, Transient
from millpond.knowledge.parsers import Parsed

Span = tuple[int, int]
_MODULE = "millpond.knowledge.reader_child"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one reading may use."""

    memory_bytes: int = 1024 * 1024 * 1024
    cpu_s: int = 60
    wall_s: float = 90.0


async def parse(media_type: str, content: bytes, limits: Limits = Limits()) -> Parsed:
    """Return a document's text; raises InvalidInput when it cannot be read, Permanent past a limit."""
    answer = await _read({"do": "parse", "media_type": media_type}, content, limits)
    return Parsed(
        text=answer["text"], title=answer["title"], page_starts=tuple(answer["page_starts"])
    )


async def split(media_type: str, text: str, limits: Limits = Limits()) -> Sequence[Span]:
    """Return the chunks of a parsed text as (start, end) in characters."""
    answer = await _read({"do": "split", "media_type": media_type}, text.encode("utf-8"), limits)
    return [(start, end) for start, end in answer["spans"]]


_STOPPED = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


async def _read(request: dict[str, Any], payload: bytes, limits: Limits) -> dict[str, Any]:
    request |= {"memory_bytes": limits.memory_bytes, "cpu_s": limits.cpu_s}
    # The environment is not passed on: it may hold keys.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        _MODULE,
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        start_new_session=True,  # a signal to the worker's group is the worker's to handle
        env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    try:
        async with asyncio.timeout(limits.wall_s):
            out, _ = await process.communicate(json.dumps(request).encode() + b"\n" + payload)
    except TimeoutError as error:
        raise _unreadable(f"reading took longer than {limits.wall_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _understood(process.returncode, out)


def _understood(code: int | None, out: bytes) -> dict[str, Any]:
    if code in _STOPPED:
        raise Transient("The document's reader was stopped.", code="reader_stopped")
    if code != 0:
        raise _unreadable(f"its reader ended with code {code} (memory, time or a broken file)")
    answer: dict[str, Any] = json.loads(out)
    if refused := answer.get("refused"):
        raise InvalidInput(refused["message"], code=refused["code"])
    if broken := answer.get("broken"):
        raise _unreadable(f"its reader failed ({broken})")
    return answer


def _unreadable(what: str) -> Permanent:
    return Permanent(f"The document cannot be read: {what}.", code="unreadable_document")
