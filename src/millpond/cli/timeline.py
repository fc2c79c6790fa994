"""A run in words: one line per event, a summary of the end. Pure; called by `runs` and the demo.

Invariant: lines hold no control codes and name steps as the flow does.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from rich.text import Text

from millpond.cli.output import plain
from millpond.types import Json

_STYLE = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "rescued": "bold yellow",
    "retrying": "yellow",
    "awaiting_input": "magenta",
    "requested": "magenta",
    "resolved": "magenta",
    "unknown": "bold magenta",
    "blocked": "bold red",
    "ending": "yellow",
    "ending_failed": "red",
    "progress": "dim",
}


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time as the API writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def event_line(event: Json, *, since: datetime | None = None) -> Text:
    """Return one event as a line: when, what, which step, details."""
    at = parse_time(event["at"])
    when = at.strftime("%H:%M:%S.%f")[:-3] if since is None else _offset(at, since)
    kind = plain(event["kind"])
    style = _STYLE.get(kind.rpartition(".")[2], "")
    line = Text.assemble((f"{when:>12}  ", "dim"), (f"{kind:<22}", style))
    for word in event_details(event):
        line.append(f" {word}")
    return line


def event_details(event: Json) -> list[str]:
    """Return what an event tells besides its kind, as short words in a fixed order."""
    data = event.get("data") or {}
    words: list[str] = []
    name = data.get("name") or event.get("step")
    if name:
        words.append(plain(name))
    if isinstance(data.get("duration_s"), int | float):
        words.append(f"{data['duration_s']:.2f} s")
    if isinstance(data.get("tries"), int) and data["tries"] > 1:
        words.append(f"try {data['tries']}")
    error = data.get("error")
    if isinstance(error, dict):
        words.append(plain(f"{error.get('code', '')}: {error.get('message', '')}"))
    if event["kind"] == "progress":
        words.extend(_progress_words(data))
    if isinstance(data.get("names"), list):
        words.append(plain(", ".join(map(str, data["names"]))))
    if data.get("role"):
        words.append(plain(f"(role {data['role']})"))
    if data.get("reason"):
        words.append(plain(data["reason"]))
    return words


def run_words(run: Json) -> str:
    """Say in one sentence how a run stands or ended."""
    words = f"run {run['id']} ({run['flow']}) {run['state']}"
    error = run.get("error")
    if isinstance(error, dict):
        words += f": {error.get('code', 'error')}: {error.get('message', '')}"
    return plain(words)


def step_rows(steps: Iterable[Json]) -> list[list[object]]:
    """Return the recorded steps of a run as table rows: name, kind, state, tries, seconds."""
    return [
        [step["name"], step["kind"], _state(step), step["tries"], duration(step), step.get("key")]
        for step in steps
    ]


def _state(step: Json) -> str:
    queue = step.get("queue")
    return f"{step['state']} in {queue}" if queue else str(step["state"])


def duration(thing: Json) -> str:
    """Return the time between `started_at` and `finished_at`, in seconds, or nothing."""
    started, finished = thing.get("started_at"), thing.get("finished_at")
    if not started or not finished:
        return ""
    return f"{(parse_time(finished) - parse_time(started)).total_seconds():.2f} s"


def _offset(at: datetime, since: datetime) -> str:
    return f"+{(at - since).total_seconds():.2f} s"


def _progress_words(data: Json) -> list[str]:
    known = {"name", "duration_s", "tries", "error", "role", "reason", "request_id"}
    return [plain(f"{key}={value}") for key, value in data.items() if key not in known]
