"""Strays: cancellations and exits inside of steps, those that somebody asked for told from those that came from inside.

Called by `performing` and `step_tries`. Invariant: what somebody outside asked for goes on as it is.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from millpond.errors import Transient


def is_asked_for(error: BaseException) -> bool:
    """Whether somebody asked the current task to be cancelled, such as a time limit around it."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def raise_stray(error: BaseException, what: str) -> NoReturn:
    """Turn a cancellation or exit that came from inside into an ordinary error.

    One that somebody asked this task for, such as a time limit around it, goes on as it is.
    """
    if is_asked_for(error):
        raise error
    raise Transient(
        f"{what} was ended by a {type(error).__name__} from inside", code="stray_exit"
    ) from error
