"""The process that runs the local text model: JSON lines in, JSON lines out.

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
        answer(server.handle_chat_completions(request))

    for line in lines:
        threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
