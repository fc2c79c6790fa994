"""The process that runs the local text model: JSON lines in, JSON lines out, pieces of text before the answer.

Started by `local_text` as `python -m millpond.models.local_child`, so that loading (which holds the
interpreter) and a crash in native code never touch the worker. Invariant: it ends when its parent
does, however that ends: its input closes, or its parent's id changes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _protocol_stream() -> TextIO:
    """Keep the real standard output for answers; native code that prints goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _load(settings: dict[str, Any]) -> Any:
    """Load the model into llama.cpp's server object, whose HTTP door nobody can reach.

    Prompts are read on `batch_threads`, tokens are written on `threads`: with more writers than idle
    cores, each token waits for the slowest. `poll` 0 keeps waiting threads from spinning.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_ctx = settings["context_tokens"]
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams.poll = 0
    params.cpuparams_batch.n_threads = settings["batch_threads"]
    params.cpuparams_batch.poll = 0
    params.api_keys = [secrets.token_hex(32)]
    if os.name != "posix":
        return xllamacpp.Server(params)
    folder = tempfile.mkdtemp(prefix="mp-")
    try:
        params.hostnames = [os.path.join(folder, "s.sock")]  # noqa: PTH118
        return xllamacpp.Server(params)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Whole:
    """A streamed answer, put together again as if it had come at once."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None

    def take(self, chunk: Any, tell: Callable[[dict[str, Any]], None]) -> None:
        """Take one part of it, or several, and tell of the text in them."""
        for part in chunk if isinstance(chunk, list) else [chunk]:
            self._error = part.get("error") or self._error
            self._usage = part.get("usage") or self._usage
            for choice in part.get("choices", ()):
                self._finish = choice.get("finish_reason") or self._finish
                if piece := choice.get("delta", {}).get("content"):
                    self._text.append(piece)
                    tell({"piece": piece})

    def answer(self) -> dict[str, Any]:
        """Return what an answer without a stream would have been."""
        if self._error is not None:
            return {"error": self._error}
        message = {"content": "".join(self._text)}
        return {
            "choices": [{"message": message, "finish_reason": self._finish}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, **self._usage},
        }


def main() -> None:
    """Load the model, say ready, then answer one request a line until the input closes."""
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    answers = _protocol_stream()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    lines = iter(sys.stdin.readline, "")
    server = _load(json.loads(next(lines)))
    answer({"ready": True})

    def serve(request: dict[str, Any]) -> None:
        if not request.get("stream"):
            answer(server.handle_chat_completions(request))
            return
        whole = Whole()
        server.handle_chat_completions(request, lambda chunk: whole.take(chunk, answer))
        answer(whole.answer())

    for line in lines:
        threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
