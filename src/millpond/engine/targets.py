"""Targets: the flow version that a schedule or a trigger starts, and whether an input still fits it.

Called by `firing` and `inbound`, where nobody is there to be refused. Invariants: what does not fit is
told by field and never by value; a schema is compiled once, and nothing is fetched for a `$ref`; what a
tenant's filter costs is bounded by its size times that of the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import jsonschema_rs
import orjson

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import InvalidInput, Permanent
from millpond.types import STANDARD, Json, Urgency

_SQL = queries("targets")
_MAX_FAULTS = 5
_MAX_REFS = 8
MAX_FILTER_BYTES = 16 * 1024
# Each lets a small schema evaluate a part of itself twice, and that part again: exponential time.
_DEAR = frozenset(
    {"$ref", "$dynamicRef", "$recursiveRef", "unevaluatedProperties", "unevaluatedItems"}
)
# Keywords under which the names of members are the tenant's own.
_NAMING = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
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
    keys: Sequence[str] = ()
    urgency: Urgency = STANDARD

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
            keys=row["keys"],
            urgency=row["urgency"],
        )
        for row in await con.fetch(_SQL["targets"], flows, versions)
    }


def satisfies(schema: str, document: Json) -> bool:
    """Whether a document satisfies a filter given as text; raises InvalidInput as `check_filter` does."""
    return _filter(schema).is_valid(document)


def check_filter(schema: Json) -> None:
    """Raise InvalidInput unless `schema` is a JSON schema that stands for itself and is cheap to use."""
    _filter(orjson.dumps(schema).decode())


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


def keeps(schema: Json, member: str) -> bool:
    """Whether what a flow reads by its schema has a member: named there, or kept with all others."""
    for _ in range(_MAX_REFS):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        schema = {**schema.get("$defs", {}).get(name, {}), "$defs": schema.get("$defs", {})}
    if not isinstance(schema, dict) or "properties" not in schema:
        return True
    return member in schema["properties"] or bool(schema.get("additionalProperties"))


@lru_cache(maxsize=1024)
def _validator(schema: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(orjson.loads(schema), mask="the value", offline=True)


@lru_cache(maxsize=1024)
def _filter(text: str) -> jsonschema_rs.Validator:
    """Compile a tenant's schema: its patterns take time in proportion to the text, whatever they are."""
    if len(text.encode()) > MAX_FILTER_BYTES:
        raise InvalidInput(
            f"a filter has at most {MAX_FILTER_BYTES} bytes",
            param="filter",
            code="filter_too_large",
        )
    schema = orjson.loads(text)
    if named := _DEAR & set(_keywords(schema)):
        raise InvalidInput(
            f"a filter may not have {', '.join(sorted(named))}: its cost could not be bounded",
            param="filter",
            code="bad_schema",
            advice="write out what is referred to",
        )
    try:
        return jsonschema_rs.validator_for(
            schema, offline=True, pattern_options=jsonschema_rs.RegexOptions()
        )
    except ValueError as error:
        raise InvalidInput(
            "filter is no JSON schema, or one whose patterns look around or back",
            param="filter",
            code="bad_schema",
        ) from error


def _keywords(schema: Json) -> Iterator[str]:
    """Return the names of all members, but of those that `properties` and the like name."""
    rest: list[tuple[Json, bool]] = [(schema, False)]
    while rest:
        part, is_names = rest.pop()
        if isinstance(part, dict):
            if not is_names:
                yield from part
            rest += [(one, not is_names and name in _NAMING) for name, one in part.items()]
        elif isinstance(part, list):
            rest += [(one, False) for one in part]


def _words(error: jsonschema_rs.ValidationError) -> str:
    place = ".".join(map(str, error.instance_path)) or "input"
    return f"{place}: {error.message}"
