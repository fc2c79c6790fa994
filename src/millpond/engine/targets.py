"""Targets: the flow version that a schedule or a trigger starts, and whether an input still fits it.

Called by `firing` and `inbound`, where nobody is there to be refused. Invariants: what does not fit is
told by field and never by value; a schema is compiled once, and nothing is fetched for a `$ref`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import jsonschema_rs
import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput, Permanent
from millpond.types import Json

_SQL = queries("targets")
_MAX_FAULTS = 5
Wanted = tuple[str, int | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A published flow version; `input_schema` is JSON text."""

    flow: str
    version: int
    queue: str
    timeout_s: float | None
    deadline_s: float | None
    input_schema: str
    is_served: bool

    def misfit(self, document: Json) -> str | None:
        """Say in words what the flow's schema refuses of an input, None when it fits."""
        try:
            validator = _validator(self.input_schema)
        except ValueError:
            return f"flow_schema_broken: the published input schema of {self.flow} cannot be used"
        if validator.is_valid(document):
            return None
        named = [_words(error) for error in islice(validator.iter_errors(document), _MAX_FAULTS)]
        return f"input_mismatch: the input does not fit {self.flow}@{self.version}: " + "; ".join(
            named
        )


async def find(con: Connection, wanted: Iterable[Wanted]) -> dict[Wanted, Target]:
    """Return the targets of (flow, version or None); those that nobody published are not there."""
    keys = sorted(set(wanted), key=str)
    if not keys:
        return {}
    flows, versions = [flow for flow, _ in keys], [version for _, version in keys]
    return {
        keys[row["nth"] - 1]: Target(
            flow=flows[row["nth"] - 1],
            version=row["version"],
            queue=row["queue"],
            timeout_s=row["timeout_s"],
            deadline_s=row["deadline_s"],
            input_schema=row["input_schema"],
            is_served=row["is_served"],
        )
        for row in await con.fetch(_SQL["targets"], flows, versions)
    }


def satisfies(schema: str, document: Json) -> bool:
    """Whether a document satisfies a JSON schema given as text, which `check_schema` let pass."""
    return _filter(schema).is_valid(document)


def check_schema(schema: Json, param: str) -> None:
    """Raise InvalidInput naming `param` unless `schema` is a JSON schema that stands for itself."""
    try:
        _filter(orjson.dumps(schema).decode())
    except ValueError as error:
        raise InvalidInput(
            f"{param} is no JSON schema, or one that refers to another document or whose patterns "
            "look around or back",
            param=param,
            code="bad_schema",
        ) from error


def faults_beyond(schema: Json, document: Json, place: Sequence[str | int]) -> list[str]:
    """Say what a flow's schema refuses of a sample, but for what stands at `place` or below.

    A part of which the schema gives several forms is not looked into. Raises Permanent for a schema
    that cannot be used.
    """
    skipped = (
        jsonschema_rs.ValidationErrorKind.AnyOf,
        jsonschema_rs.ValidationErrorKind.OneOfNotValid,
    )
    try:
        validator = _validator(orjson.dumps(schema).decode())
    except ValueError as error:
        raise Permanent(
            "the published input schema of the flow cannot be used", code="flow_schema_broken"
        ) from error
    return [
        _words(error)
        for error in islice(validator.iter_errors(document), _MAX_FAULTS)
        if error.instance_path[: len(place)] != list(place) and not isinstance(error.kind, skipped)
    ]


@lru_cache(maxsize=1024)
def _validator(schema: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(orjson.loads(schema), mask="the value", offline=True)


@lru_cache(maxsize=1024)
def _filter(schema: str) -> jsonschema_rs.Validator:
    """Compile a tenant's schema: its patterns take time in proportion to the text, whatever they are."""
    return jsonschema_rs.validator_for(
        orjson.loads(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions()
    )


def _words(error: jsonschema_rs.ValidationError) -> str:
    place = ".".join(map(str, error.instance_path)) or "input"
    return f"{place}: {error.message}"
