"""What the demo shows: headings, live events of several runs, replies, findings.

Called by `play`. Invariant: it only prints; text from models and documents reaches the terminal
without control codes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Console
from rich.text import Text

from millpond.cli import timeline
from millpond.cli.demo.proof import Finding
from millpond.cli.output import out, plain
from millpond.types import Json

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
_QUOTE_CHARS = 160


class Stage:
    """The terminal; lines when it is none. With `is_quiet` nothing is printed."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._console = Console(quiet=True) if is_quiet else out()
        self._since: datetime | None = None
        self._labels: list[str] = []
        self._act = 0

    def act(self, title: str) -> None:
        """Begin a new part of the play."""
        self._act += 1
        self.say("")
        self._print(Text(f"{self._act}. {title}", style="bold"))

    def say(self, words: str, *, style: str = "") -> None:
        """Print a line."""
        self._print(Text(plain(words), style=style))

    def event(self, label: str, event: Json) -> None:
        """Print one event of the run `label`, as it comes."""
        if self._since is None:
            self._since = timeline.parse_time(event["at"])
        line = Text(f"   {label:<4}", style=self._colour(label))
        line.append_text(timeline.event_line(event, since=self._since))
        self._print(line)

    def timeline(self, label: str, run: Json) -> None:
        """Print the recorded steps of a run with when they began and how long they took."""
        began = timeline.parse_time(run["created_at"])
        self._print(Text(f"   {label}  {plain(timeline.run_words(run))}", style="bold"))
        for step in run["steps"]:
            at = (timeline.parse_time(step["started_at"]) - began).total_seconds()
            took = timeline.duration(step)
            words = f"      {at:>7.2f} s  {step['name']:<20} {step['state']:<8} {took:>9}"
            self.say(f"{words}  tries {step['tries']}")

    def reply(self, question: str, output: Json) -> None:
        """Print a reply with its sources."""
        self.say(f"      question: {question}")
        self.say(f"      outcome:  {output['outcome']} by {output['decided_by']}")
        self.say(f"      topic:    {output['topic'] or '–'}")
        for line in textwrap.wrap(output["reply"] or "(nothing was sent)", 88):
            self.say(f"      │ {line}", style="italic")
        for number, source in enumerate(output["citations"], 1):
            quote = " ".join(source["quote"].split())
            short = quote if len(quote) <= _QUOTE_CHARS else quote[:_QUOTE_CHARS] + " …"
            place = f"{source['document']}, characters {source['start']}–{source['end']}"
            self.say(f"      [{number}] {place}: “{short}”", style="dim")

    def findings(self, findings: Iterable[Finding]) -> None:
        """Print each claim with its verdict."""
        for finding in findings:
            sign, style = ("✓", "green") if finding.is_true else ("✗", "bold red")
            detail = f" ({finding.detail})" if finding.detail else ""
            self._print(Text(f"   {sign} {plain(finding.claim + detail)}", style=style))

    def queues(self, queues: Sequence[Json]) -> None:
        """Print what the queues hold."""
        for queue in queues:
            self.say(
                f"   {queue['name']:<10} queued {queue['queued']}, running {queue['running']} of "
                f"{queue['slots']} slots, awaiting input {queue['awaiting_input']}"
            )

    def _colour(self, label: str) -> str:
        if label not in self._labels:
            self._labels.append(label)
        return _COLOURS[self._labels.index(label) % len(_COLOURS)]

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()
