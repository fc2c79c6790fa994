"""Texts: what a short text that comes from outside may be, and a moment.

Called by the request models and by routes with query and path parameters. Invariant: no control character
reaches the database, where NUL cannot be stored and others break what people read.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, StringConstraints
from pydantic_core import PydanticCustomError

from millpond.errors import InvalidInput

PLAIN = r"^[^\x00-\x1f\x7f]*$"
RESERVED = "millpond."
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)

Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PLAIN)]
Reason = Annotated[str, StringConstraints(max_length=500, pattern=PLAIN)]
LongWord = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=PLAIN)]
StepKey = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=PLAIN)]
LabelName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=PLAIN)]
LabelPair = Annotated[str, StringConstraints(min_length=2, max_length=321, pattern=PLAIN)]
LabelValue = Annotated[str, StringConstraints(max_length=256, pattern=PLAIN)]


def _check_own(name: str) -> str:
    if name.startswith(RESERVED):
        raise PydanticCustomError(
            "label_reserved",
            "names of labels that begin with `millpond.` are set by Millpond alone",
        )
    return name


def _check_name(name: str) -> str:
    try:
        uuid.UUID(name)
    except ValueError:
        return name
    raise PydanticCustomError("name_is_id", "a name that reads as an id could not be told from one")


OwnLabelName = Annotated[LabelName, AfterValidator(_check_own)]
Name = Annotated[Word, AfterValidator(_check_name)]


def moment(at: datetime | None, param: str) -> datetime | None:
    """Return a time as it was given; raises InvalidInput without a time zone, or far from our days."""
    if at is None:
        return None
    if at.tzinfo is None:
        raise InvalidInput(f"{param} needs a time zone, for example `Z`", param=param)
    if not _EARLIEST <= at < _LATEST:
        raise InvalidInput(f"{param} is a time from 1970 to 9998", param=param)
    return at
