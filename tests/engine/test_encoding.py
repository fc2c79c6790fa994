"""What encoding keeps of functions whose results it encodes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from pydantic import BaseModel

from millpond.engine import encoding
from millpond.engine.encoding import output_of


class Page(BaseModel):
    number: int


def _made(*, is_declared: bool) -> tuple[Callable[[], object], weakref.ref[Page]]:
    """Return a function over something big, and a look at that."""
    big = Page(number=1)

    def declared() -> Page:
        return big

    def bare():  # type: ignore[no-untyped-def]
        return big

    return (declared if is_declared else bare), weakref.ref(big)


def test_a_function_that_is_gone_is_not_kept_alive_by_what_it_declared() -> None:
    gc.collect()
    known = len(encoding._outputs)
    for is_declared in (True, False):
        function, big = _made(is_declared=is_declared)
        assert (output_of(function) is not None) == is_declared
        assert output_of(function) is output_of(function)
        del function
        gc.collect()
        assert big() is None
        assert len(encoding._outputs) == known
