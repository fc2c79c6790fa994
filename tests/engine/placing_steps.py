"""Steps for tests that execute in child processes, which find them by their names."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from millpond.engine.registry import Registry, step
from millpond.engine.step_context import StepContext
from millpond.errors import NotFound
from millpond.retry import Retry

REGISTRY = Registry()
_TWICE = Retry(max_tries=2, base_s=0.01)


@step("tests.crunch", runs_in="process", registry=REGISTRY)
def crunch(step_ctx: StepContext, n: int) -> list[Any]:
    """Compute in this process; tell which one it is."""
    return [sum(range(n)), os.getpid(), step_ctx.idempotency_key]


@step("tests.die", runs_in="process", retry=_TWICE, registry=REGISTRY)
def die(step_ctx: StepContext, log: str) -> None:
    """Be killed, as the kernel does when memory is short."""
    with open(log, "a") as file:
        file.write("died\n")
    os.kill(os.getpid(), signal.SIGKILL)


@step("tests.spin", runs_in="process", timeout_s=2.0, retry=Retry(max_tries=1), registry=REGISTRY)
def spin(step_ctx: StepContext, log: str) -> None:
    """Compute for longer than the time limit."""
    with open(log, "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(0.01)


@step("tests.miss", runs_in="process", registry=REGISTRY)
def miss(step_ctx: StepContext) -> None:
    """Raise an error of Millpond's."""
    raise NotFound("no such row", code="row_gone", param="row")


class OddError(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@step("tests.odd", runs_in="process", retry=Retry(max_tries=1), registry=REGISTRY)
def odd(step_ctx: StepContext) -> None:
    """Raise an error of others' code."""
    raise OddError(1, 2)


@step("tests.ask_resource", runs_in="process", registry=REGISTRY)
def ask_resource(step_ctx: StepContext) -> int:
    """Ask for what only the worker has."""
    return len(step_ctx.get(str))
