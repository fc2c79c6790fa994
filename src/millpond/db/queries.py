"""Named SQL: reads `db/sql/*.sql` once and hands out statements by name.

A file holds statements, each under a line `-- name: what_it_does` followed by one comment line.
`queries("claim")["take"]` is the text of statement `take` in `claim.sql`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

_NAME = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)


@cache
def queries(room: str) -> Mapping[str, str]:
    """Return the statements of `db/sql/<room>.sql` by their names; a name may stand once only."""
    text = files("millpond.db").joinpath("sql", f"{room}.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)
    named: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name in named:
            raise ValueError(f"sql/{room}.sql has two statements named {name}")
        named[name] = body.strip()
    return MappingProxyType(named)
