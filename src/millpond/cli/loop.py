"""The event loop of the long-lived processes.

Called by `serve` and `work`. Invariant: uvloop where there is one, asyncio's own loop elsewhere.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import Coroutine
from typing import Any


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` to its end.

    What start-up made stays for good, so the collector need not walk it; and short-lived futures
    and tasks free themselves, so it may look less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
        return
    import uvloop

    uvloop.run(main)
