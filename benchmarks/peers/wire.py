"""The wire between a driver and the one who measures: one JSON line per order, one per answer.

Imported by every Python driver, also in the peers' own environment, so it needs nothing but the
standard library. The first line of standard input is the set-up, all others are orders
`{"do": name, "count": n}`. Invariant: nothing but answers goes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Answer = dict[str, Any]
# As given to every system: 226 bytes of JSON.
PAYLOAD = json.dumps({"customer": "c-1042", "text": "x" * 193}, separators=(",", ":"))
BATCH = 1000
SETTLED_S = 1.5
PAUSE_S = 0.02


def take_stdout() -> TextIO:
    """Keep standard output for answers; whatever else prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def read_setup() -> Mapping[str, Any]:
    """Read the first line: where the server is."""
    setup: Mapping[str, Any] = json.loads(sys.stdin.readline())
    return setup


def serve(orders: Mapping[str, Callable[[int], Answer]], answers: TextIO) -> None:
    """Answer orders until standard input closes."""
    answers.write('{"ready":true}\n')
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(orders[order["do"]](order["count"])) + "\n")


def batches(count: int) -> list[int]:
    """Cut a count into batches."""
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]


def timed(calls: list[Callable[[], object]], count: int) -> list[list[float]]:
    """Call each in turn, `count` times round; return the seconds of each call, per callable."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(count):
        for call, seconds in zip(calls, took, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return took


def wait_until(is_so: Callable[[], bool], *, pause_s: float = 0.005) -> None:
    """Poll until something is so; the one who measures sets the time limit."""
    while not is_so():
        time.sleep(pause_s)
