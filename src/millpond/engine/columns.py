"""Columns: many values of a column as one text parameter, which the server parts again.

Called by the rooms that write many rows in one statement. The driver encodes an array element by element;
joined text costs a third of that here, and the server as much. Invariant: a value that holds the separator
is refused, so that no value ever moves into another row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millpond.errors import InvalidInput

# What parts the values; `chr(30)` in the statements. JSON text never holds it: there it is escaped.
SEPARATOR = "\x1e"


def plain(values: Iterable[object]) -> str:
    """Join values whose text cannot hold the separator, such as ids and numbers."""
    return SEPARATOR.join(map(str, values))


def texts(values: Sequence[str]) -> str:
    """Join texts; raises InvalidInput where one holds the separator.

    A single empty one would come out as null, so none may be empty where it is not to be.
    """
    joined = SEPARATOR.join(values)
    if joined.count(SEPARATOR) != max(0, len(values) - 1):
        raise InvalidInput("A value holds the control character 30.", code="unstorable_value")
    return joined


def optional(values: Sequence[str | None]) -> str:
    """Join texts of which none is empty; None goes as an empty one."""
    return texts([value or "" for value in values])
