"""Payloads: JSON values that are too big for the rows which are read and written all the time.

Called by submit, commit, the worker and the views. Invariants: a value above 256 KiB stands in table
`payload`, written in the transaction of the row that it belongs to, whose column is null; above 16 MiB
nothing is stored.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput

_SQL = queries("payloads")
INLINE_BYTES = 256 * 1024
# A text of no more characters is not above that: a character has at most four bytes.
SMALL = INLINE_BYTES // 4
MAX_BYTES = 16 * 1024 * 1024
INPUT, OUTPUT = "input", "output"


class Payload(NamedTuple):
    """A big value of a run and the place that it is for."""

    org_id: int
    run_id: uuid.UUID
    slot: str
    text: str


def slot_of_step(step_key: str) -> str:
    """Name the place of a step's result."""
    return f"step:{step_key}"


def slot_of_arguments(step_key: str) -> str:
    """Name the place of the arguments of a step that executes in another queue."""
    return f"args:{step_key}"


def is_big(text: str | None) -> bool:
    """Whether a JSON text stands in a row of its own."""
    if text is None or len(text) <= SMALL:
        return False
    return len(text) > INLINE_BYTES or len(text.encode()) > INLINE_BYTES


def inline(text: str | None) -> str | None:
    """Return what the row itself holds of a JSON text."""
    return None if is_big(text) else text


def check_size(text: str | bytes, what: str, *, param: str) -> None:
    """Raise InvalidInput that names both sizes when JSON is over 16 MiB."""
    if isinstance(text, str) and 4 * len(text) <= MAX_BYTES:
        return
    size_bytes = len(text) if isinstance(text, bytes) else len(text.encode())
    if size_bytes > MAX_BYTES:
        raise InvalidInput(
            f"{what} would take {size_bytes} bytes of JSON; at most {MAX_BYTES} are stored",
            code="value_too_large",
            param=param,
            advice="store large data elsewhere and pass a reference",
        )


async def keep(con: Connection, payloads: Sequence[Payload]) -> None:
    """Store payloads, one statement for all; one that is there already is left."""
    if payloads:
        await con.execute(_SQL["keep"], *(list(column) for column in zip(*payloads, strict=True)))


async def read(
    con: Connection, wanted: Sequence[tuple[int, uuid.UUID, str]]
) -> dict[tuple[int, uuid.UUID, str], str]:
    """Return the texts of payloads by org, run and slot; those that are not there are left out."""
    if not wanted:
        return {}
    rows = await con.fetch(_SQL["read"], *(list(column) for column in zip(*wanted, strict=True)))
    return {(row["org_id"], row["run_id"], row["slot"]): row["body"] for row in rows}
