"""Options that many commands share, and how their values are read.

Called by the command files. Invariant: an option has the same name and meaning in every command.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from millpond.errors import InvalidInput
from millpond.types import Json

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Url = Annotated[
    str,
    typer.Option(envvar="MILLPOND_URL", help="Address of the server.", show_default=True),
]


@dataclass(frozen=True, slots=True)
class Bearer:
    """What a command was given to call with: a token, and the org of the option before the command."""

    token: str | None = field(default=None, repr=False)
    org: str | None = None


def _with_org(context: typer.Context, given: Bearer | None) -> Bearer:
    return Bearer(given.token if given else None, context.find_root().params.get("org"))


Token = Annotated[
    Bearer | None,
    typer.Option(
        envvar="MILLPOND_TOKEN",
        help="Bearer token. Unset: the session of `millpond login`, else `millpond up`'s development token.",
        show_default=False,
        parser=Bearer,
        metavar="TEXT",
        callback=_with_org,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Folder of the embedded database and keys (MILLPOND_DATA_DIR)."
    ),
]
Flows = Annotated[
    str | None,
    typer.Option(
        "--flows",
        help="Modules that register flows, separated by commas (MILLPOND_FLOWS).",
    ),
]
WorkerLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="What the worker has, as name=value; may stand several times (MILLPOND_LABELS).",
    ),
]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)]

DEFAULT_URL = "http://127.0.0.1:8080"


def read_json(text: str, *, param: str) -> Json:
    """Read JSON given as text, as `@file`, or as `-` for stdin.

    Raises InvalidInput naming `param` when it is not JSON or the file cannot be read.
    """
    try:
        return json.loads(_read_text(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{text[1:]} cannot be read: {error}", param=param) from error
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            param=param,
            advice="Give JSON text, @file, or - to read stdin.",
        ) from error


def joined_labels(labels: list[str] | None) -> str | None:
    """Return `--label` options as MILLPOND_LABELS has them; None when there are none."""
    return ",".join(labels) if labels else None


def read_pairs(pairs: list[str], *, param: str) -> dict[str, str]:
    """Read `name=value` pairs; raises InvalidInput naming `param` for one without `=`."""
    read: dict[str, str] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise InvalidInput(f"{pair!r} is not name=value", param=param)
        read[name] = value
    return read


def _read_text(text: str) -> str:
    if text == "-":
        return sys.stdin.read()
    if text.startswith("@"):
        return Path(text[1:]).read_text(encoding="utf-8")
    return text
