"""Files of runs to start: one JSON object a line, as `runs start --batch` takes them.

Called by `runs`. Invariant: a line at fault is named by its number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from millpond.errors import InvalidInput
from millpond.types import Json


def read_batch(path: str, defaults: Mapping[str, Json]) -> list[Json]:
    """Read the wishes of a file, or of stdin for `-`; `defaults` hold where a line says nothing.

    Raises InvalidInput naming the line that is no JSON object.
    """
    wishes = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            wish = json.loads(line)
        except json.JSONDecodeError as error:
            raise _fault(number, f"is not JSON: {error.msg}") from error
        if not isinstance(wish, dict):
            raise _fault(number, "is no JSON object")
        wishes.append({**defaults, **wish})
    return wishes


def _lines(path: str) -> list[str]:
    if path == "-":
        return sys.stdin.read().splitlines()
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", param="--batch") from error


def _fault(number: int, what: str) -> InvalidInput:
    return InvalidInput(
        f"line {number} {what}",
        param="--batch",
        advice='Give one object a line, such as {"flow": "…", "input": …}.',
    )
