"""Growing: what a run tells, on a page where text of steps under way grows between the lines.

Called by `runs tail`. Invariants: text grows on a terminal alone; an event stands on a line of its own; text holds no
control codes.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from millpond.cli import timeline
from millpond.cli.output import plain
from millpond.types import Json


class Growing:
    """One console, and whose text grows at its end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._growing: tuple[str, int, int] | None = None

    def show(self, told: Json) -> None:
        """Print an event as a line, or let a step's text go on where it was left."""
        if "kind" in told:
            self._end_line()
            self._console.print(timeline.event_line(told), soft_wrap=True)
        elif self._console.is_terminal:
            self._grow(told)

    def _grow(self, delta: Json) -> None:
        whose = (delta["step"], delta["attempt"], delta["tries"])
        if whose != self._growing:
            self._end_line()
            self._console.print(Text(f"{plain(delta['step'])}:", "dim"))
            self._growing = whose
        self._console.print(Text(plain(delta["text"])), end="", soft_wrap=True)

    def _end_line(self) -> None:
        if self._growing is not None:
            self._console.print()
            self._growing = None
