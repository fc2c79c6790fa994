"""Placing: where a step's function executes: on the event loop, in a thread, or in a process of its own.

Called by `context` and `step_tries`, one Placing per worker. Invariants: a thread that was started is
waited for, whatever happens to the task that started it, so that nothing is given back under it; a child
process that is not waited for any more is killed, and one that dies fails its own try alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from millpond.engine.registry import Step, place_of
from millpond.engine.step_context import StepContext, StepFacts
from millpond.errors import MillpondError, Permanent, Transient

_MAX_THREADS = 100


class Placing:
    """The threads and child processes of one worker."""

    def __init__(self, *, threads: int, processes: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(
            max(1, min(threads, _MAX_THREADS)), thread_name_prefix="step"
        )
        self._processes = processes or os.cpu_count() or 1
        self._limiter: CapacityLimiter | None = None

    async def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        keeps: Callable[[], bool],
    ) -> Any:
        """Call an async function here, or a plain one in a thread; returns its result.

        A thread's result that comes after this task was cancelled counts if `keeps` says so then.
        """
        if place_of(function) == "loop":
            return await function(*args, **kwargs)
        value = await self._in_thread(lambda: function(*args, **kwargs), keeps)
        # A plain function may hand out an awaitable, as one that only wraps an async function does.
        return await value if inspect.isawaitable(value) else value

    async def call_step(
        self,
        step: Step[..., Any],
        first: StepContext,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        keeps: Callable[[], bool],
    ) -> Any:
        """As `call`, of a registered step; what it told of is stored before this returns, but for a `once` step."""
        value = await self.call(step.function, (first, *args), kwargs, keeps=keeps)
        if step.effect != "once":  # whose outcome, once it is known, waits for nothing
            await first.told()
        return value

    async def call_apart(
        self,
        function: Callable[..., Any],
        facts: StepFacts,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call a step's function in a child process, which is killed when this task is cancelled.

        Raises Transient when the child dies, Permanent when an argument or the result cannot be passed.
        """
        if self._limiter is None:
            self._limiter = CapacityLimiter(self._processes)
        where = function.__module__, function.__qualname__
        try:
            order = pickle.dumps((where, facts, args, dict(kwargs)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise Permanent(
                "an argument cannot be passed to a process of its own", code="not_picklable"
            ) from error
        try:
            done, text = await to_process.run_sync(
                execute_order, order, cancellable=True, limiter=self._limiter
            )
        except BrokenWorkerProcess as error:
            raise Transient(
                "the process of this step died: it was killed, ran out of memory or left by itself",
                code="process_died",
            ) from error
        value = pickle.loads(text)  # noqa: S301 - from this worker's own child
        if not done:
            raise value
        return value

    def close(self) -> None:
        """Start nothing any more; what runs in a thread goes on."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], Any], keeps: Callable[[], bool]) -> Any:
        run = contextvars.copy_context().run
        thread = self._threads.submit(run, _outcome, call)
        future = asyncio.wrap_future(thread)
        try:
            value, error = await asyncio.shield(future)
        except asyncio.CancelledError:
            if thread.cancel():  # it had not begun
                raise
            value, error = await _outlast(future)
            if error is not None or not keeps():
                raise
        if error is not None:
            raise error
        return value


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Call, and hand out what was raised as a value: a future does not take all of them."""
    try:
        return call(), None
    except StopIteration as error:
        return None, RuntimeError(f"the step raised {type(error).__name__}")
    except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
        return None, error


async def _outlast(future: asyncio.Future[Any]) -> Any:
    """Wait for a thread to return, however often this task is cancelled meanwhile."""
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            continue
    return future.result()


# In the child process


def execute_order(order: bytes) -> tuple[bool, bytes]:
    """Call the named function in this process; returns whether it returned, and what or the error."""
    try:
        (module, name), facts, args, kwargs = pickle.loads(order)  # noqa: S301 - from the worker
        value = _found(module, name)(StepContext(facts), *args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - goes to the worker
        return False, _passed(error)
    try:
        return True, pickle.dumps(value)
    except Exception as error:  # noqa: BLE001 - whatever the value's own code raises
        return False, _passed(
            Permanent(f"the result cannot be passed on: {error}", code="not_picklable")
        )


def _found(module: str, name: str) -> Callable[..., Any]:
    """Return a function by its name, under which its registration may stand."""
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "function", found)  # type: ignore[no-any-return]


def _passed(error: BaseException) -> bytes:
    """Pickle an error; one that does not come back whole is told of in words."""
    if not isinstance(error, Exception):
        error = Transient(
            f"the step was ended by a {type(error).__name__} from inside", code="stray_exit"
        )
    try:
        text = pickle.dumps(error)
        if type(pickle.loads(text)) is type(error):  # noqa: S301 - just written
            return text
    except Exception:  # noqa: BLE001, S110 - an error of others' code, told of below
        pass
    if isinstance(error, MillpondError):
        return pickle.dumps(Permanent(error.message, code=error.code))
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
