"""Logging: structlog and the standard library's loggers end in one stream on stderr.

Called once by each long-running command. Invariants: JSON lines where stderr is no terminal; values
under names of secrets, and passwords inside addresses, never reach the stream.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from typing import Any, TextIO

import structlog
from structlog.types import EventDict, Processor

from millpond import veil

_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|secret|token|authorization|api_?key|cookie|private|dsn)($|_)", re.I
)
_SECRET_TEXT = (
    (re.compile(r"(\w+://[^/\s:@]*):[^@\s/]+@"), r"\1:***@"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), "***"),
    (re.compile(r"(?i)\bbearer\s+[\w.~+/=-]+"), "Bearer ***"),
)


def configure_logging(level: str, *, process: str, stream: TextIO | None = None) -> None:
    """Send every log line to `stream` (stderr), each with the name of the `process` that wrote it."""
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(process),
    ]
    is_terminal = stream.isatty()
    ending: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    ending += [where_it_failed, redact]
    ending.append(
        structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=ending)
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx2", "httpcore2", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def where_it_failed(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Put classes and code lines in place of an exception.

    Its text and the values of its variables may hold prompts, tokens and addresses; what a run has
    to tell of its error is stored with the run.
    """
    given = event.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else given
    if error is not None and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    lines: list[str] = []
    while error is not None:
        lines += [type(error).__name__, *traceback.format_tb(error.__traceback__)]
        error = error.__cause__
    if lines:
        event["exception"] = "\n".join(line.rstrip() for line in lines)
    return event


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Hide secrets: those of the current run by value, values under a telling name, passwords in addresses, tokens.

    A line of no run, such as one of a thread that a step began by itself, may be of any: those of all are hidden.
    """
    current = veil.current()
    for drawn in veil.live() if current is None else [current]:
        if drawn:
            event = {name: drawn.value(_plain(value)) for name, value in event.items()}
    return {name: _hidden(name, value) for name, value in event.items()}


def _plain(value: Any) -> Any:
    """Return a value as it will be shown, where it is no JSON."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


def _hidden(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name) and not isinstance(value, bool | int | float):
        return "***"
    if isinstance(value, str):
        for pattern, instead in _SECRET_TEXT:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, dict):
        return {key: _hidden(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden("", inner) for inner in value]
    return value


def _named(process: str) -> Processor:
    def add(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    return add
