"""The process that reads foreign documents: one request in, one answer out, then it ends.

Started by `reader` as `python -m millpond.knowledge.reader_child`. Invariant: its memory, processor
time and files are capped before the first foreign byte is looked at, and it holds no secret.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from millpond.errors import InvalidInput
from millpond.knowledge.chunker import spans
from millpond.knowledge.parsers import parse


def _limit(memory_bytes: int, cpu_s: int) -> None:
    """Cap this process where the system can (not on Windows, where the parent's clock remains)."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _answer(request: dict[str, Any], payload: bytes) -> dict[str, Any]:
    if request["do"] == "parse":
        parsed = parse(request["media_type"], payload)
        return {"text": parsed.text, "title": parsed.title, "page_starts": parsed.page_starts}
    return {"spans": spans(request["media_type"], payload.decode("utf-8"))}


def main() -> None:
    """Read a JSON line and the payload after it; write one JSON object."""
    request = json.loads(sys.stdin.buffer.readline())
    _limit(request["memory_bytes"], request["cpu_s"])
    try:
        answer = _answer(request, sys.stdin.buffer.read())
    except InvalidInput as error:
        answer = {"refused": {"message": error.message, "code": error.code}}
    except MemoryError:
        answer = {
            "refused": {"message": "The document needs too much memory.", "code": "too_large"}
        }
    except Exception as error:  # noqa: BLE001 - the last frame of this process: say what broke
        answer = {"broken": type(error).__name__}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
