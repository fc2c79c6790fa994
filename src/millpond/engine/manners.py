"""Manners: how a step's author wants it performed, each time that a run comes to it. Pure.

Made once for each registered step (`registry`), and for others where they are called (`calling`); part of every
`plans.Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from millpond.retry import Retry

# Who decides about a step of which nobody knows whether it took effect.
ASK_ROLE = "operator"


@dataclass(frozen=True, slots=True)
class Manner:
    """How a step is to be performed.

    `is_once` forbids to repeat its effect; one that `acts` needs the run's rights, and `permission` too. `keys` are
    what a try counts on beside its run, the step's own (`is_declared`) or given where it is called.
    """

    retry: Retry
    timeout_s: float | None = None
    output: TypeAdapter[Any] | None = None
    is_once: bool = False
    ask_role: str = ASK_ROLE
    acts: bool = True
    permission: str | None = None
    keys: tuple[str, ...] = ()
    is_declared: bool = False

    @property
    def declared(self) -> tuple[str, ...]:
        """The keys that the step itself declares: those given where it is called may come from anybody's input."""
        return self.keys if self.is_declared else ()
