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
# The noisy neighbour: A has a backlog of runs that rest, B submits one now and then; both share the slots.
NAP_S = 0.02
SHARED_SLOTS = 20
# Where the way of fairness is a limit per tenant: it leaves one slot that a tenant alone cannot take.
SLOTS_OF_ONE = 19
EVERY_S = 0.04
RUNS_PER_VISIT = 50
# From when to when the code of each run ran, by its name: `a…` are A's, `b…` are B's.
Naps = dict[str, tuple[float, float]]


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


def visits(count: int) -> int:
    """Return how many runs B submits while A has `count` queued."""
    return max(2, count // RUNS_PER_VISIT)


def noisy(beside: Naps, alone: Naps, sent: Mapping[str, float]) -> Answer:
    """Make the answer: how long each of B's runs waited since it was sent, and how long A's runs took as a whole."""
    return {
        "took_s": [beside[name][0] - at for name, at in sent.items()],
        "beside_s": span(beside),
        "alone_s": span(alone),
    }


def span(naps: Naps) -> float:
    """Return the seconds from A's first start to A's last end."""
    of_a = [times for name, times in naps.items() if name.startswith("a")]
    return max(ended for _, ended in of_a) - min(began for began, _ in of_a)


def visit(send: Callable[[int], None], count: int) -> None:
    """Call `send` for each visit, at fixed times whatever it takes."""
    start = time.perf_counter()
    for n in range(count):
        time.sleep(max(0.0, start + n * EVERY_S - time.perf_counter()))
        send(n)


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
