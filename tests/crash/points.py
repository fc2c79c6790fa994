"""The commit points of the engine, read from its source, so that none is forgotten.

Every transaction of the engine is opened by `duty("name")`, `chain("name")` or `statement("name")`; each has a point
before and after its commit, which a probe hears of (db/pool.py).
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "millpond"
ENGINE = SOURCE / "engine"
OPENERS = frozenset({"chain", "duty", "statement"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One place that opens transactions: its names, none when they cannot be read from the source."""

    file: str
    line: int
    names: tuple[str, ...]


@functools.cache
def sites(root: Path = SOURCE) -> list[Site]:
    """Return every place under `root` that opens a transaction of the engine."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in OPENERS:
                names = _names(node.args[0]) if node.args else ()
                found.append(Site(file=path.name, line=node.lineno, names=names))
    return found


def _names(first: ast.expr) -> tuple[str, ...]:
    """Return the names that an argument can be: a text, or one of two texts by a condition."""
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        return (first.value,)
    if isinstance(first, ast.IfExp):
        one, other = _names(first.body), _names(first.orelse)
        return (*one, *other) if one and other else ()
    return ()


def names() -> list[str]:
    """Return the name of every commit point, in order."""
    return sorted({name for site in sites() for name in site.names})
