"""What commands print: results to stdout, progress and errors to stderr.

Called by every command. Invariants: with `--json` stdout carries JSON and nothing else; progress
appears only where stderr is a terminal; text from outside reaches a terminal without control codes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millpond.errors import MillpondError
from millpond.types import Json

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STATE_STYLE = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "awaiting_input": "magenta",
    "done": "green",
}
_NARROWEST = 100


def plain(text: object) -> str:
    """Return `text` without control and direction codes: what others wrote must not steer a terminal."""
    return _CONTROL.sub("", str(text))


def out() -> Console:
    """Return a console on stdout as it is now; wide enough to keep ids whole when it is no terminal."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=False, emoji=False)
    if not console.is_terminal and console.width < _NARROWEST:
        console.width = 160
    return console


def err() -> Console:
    """Return a console on stderr as it is now."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True, emoji=False)


def print_json(document: Json) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(document: Json) -> None:
    """Print one JSON document on one line to stdout, at once."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    empty: str,
    title: str = "",
    whole: Collection[str] = (),
) -> None:
    """Print a table, or the sentence `empty` when it has no rows; columns in `whole` are never folded."""
    filled = [list(row) for row in rows]
    if not filled:
        out().print(Text(empty))
        return
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    for row in filled:
        table.add_row(*[cell(value) for value in row])
    out().print(table)


def cell(value: object) -> Text:
    """Turn a value into a table cell; a state gets its colour, nothing becomes a dash."""
    if isinstance(value, Text):
        return value
    if value is None or value == "":
        return Text("–", style="dim")
    if isinstance(value, dict | list):
        return Text(plain(json.dumps(value, ensure_ascii=False)))
    text = plain(value)
    return Text(text, style=_STATE_STYLE.get(text, ""))


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print named values one under the other."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(Text(name), cell(value))
    out().print(table)


def progress(message: str) -> None:
    """Say on stderr what is being done, only to a terminal."""
    if sys.stderr.isatty():
        err().print(Text(plain(message), style="dim"))


def print_error(error: MillpondError) -> None:
    """Print an expected error as one line, and what to do about it as a second."""
    where = f" ({plain(error.param)})" if error.param and error.param not in error.message else ""
    err().print(Text.assemble(("error: ", "bold red"), plain(error.message) + where))
    if error.advice:
        err().print(Text.assemble(("advice: ", "bold"), plain(error.advice)))
