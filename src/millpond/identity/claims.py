"""What the claims of an outside token mean in an org: which role they give, if any. Pure.

Called by `issuers` to check rules and by `outside_reader` to follow them. Invariants: a claim is compared as a whole
and exactly; what no rule names gives nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millpond.errors import InvalidInput
from millpond.types import Json

_MAX_VALUES = 1000
# RFC 8693 and what some issuers call it: words with spaces between.
_WORDS = ("scope", "scp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Values of a claim that give a role. A claim is a name, or a JSON pointer that begins with `/`."""

    claim: str
    values: tuple[str, ...]
    role: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """The role that a token's claims gave, and by what."""

    role: str
    claim: str
    value: str


def values_at(claims: Mapping[str, Json], claim: str) -> list[str]:
    """Return what stands at a claim as texts: a text, a number, a boolean, or a list of them; else nothing."""
    found = _at_pointer(claims, claim) if claim.startswith("/") else claims.get(claim)
    if isinstance(found, str) and claim in _WORDS:
        return found.split()
    listed = found if isinstance(found, list) else [found]
    return [text for one in listed[:_MAX_VALUES] if (text := _text(one)) is not None]


def match(claims: Mapping[str, Json], rules: Sequence[Rule]) -> Match | None:
    """Return the role that the first fitting rule gives."""
    for rule in rules:
        held = values_at(claims, rule.claim)
        value = next((one for one in rule.values if one in held), None)
        if value is not None:
            return Match(role=rule.role, claim=rule.claim, value=value)
    return None


def check_claim(claim: str, *, param: str) -> None:
    """Raise InvalidInput for what cannot be the place of a claim."""
    if claim.startswith("/") and (claim == "/" or "~" in claim.replace("~0", "").replace("~1", "")):
        raise InvalidInput(f"{claim!r} is not a JSON pointer to a claim", param=param)


def _at_pointer(claims: Mapping[str, Json], pointer: str) -> Json:
    """Follow a JSON pointer (RFC 6901) through objects."""
    found: Json = claims
    for part in pointer[1:].split("/"):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _text(value: Json) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | str):
        return str(value)
    return None
