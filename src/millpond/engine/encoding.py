"""Encoding: results and errors to JSON text and back, the same on first run and on replay.

Called by `context` and `executor`. Invariant: what `load` gives back equals what `dump` was given,
as far as JSON and the declared type can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints
from weakref import ref

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from millpond import veil
from millpond.engine.payloads import MAX_BYTES, check_size
from millpond.errors import InvalidInput, MillpondError
from millpond.types import Json

_MAX_MESSAGE = 2000
# By weak reference, as a WeakKeyDictionary has it, which takes three calls of Python for a look.
_outputs: dict[ref[Callable[..., Any]], TypeAdapter[Any] | None] = {}
_UNKNOWN: TypeAdapter[Any] = TypeAdapter(Any)


def dump(adapter: TypeAdapter[Any] | None, value: Any) -> str:
    """Return JSON text of a value, veiled; raises InvalidInput when it is no JSON or over 16 MiB."""
    if value is None:
        return "null"
    try:
        raw = (
            orjson.dumps(value, default=_plain)
            if adapter is None
            else adapter.serializer.to_json(value, warnings="error")
        )
    except (TypeError, ValueError, PydanticSerializationError) as error:
        kind = type(value).__name__
        raise InvalidInput(
            f"a {kind} does not fit the declared JSON output", code="not_json", param="output"
        ) from error
    if len(raw) > MAX_BYTES:
        check_size(raw, "the output", param="output")
    drawn = veil.drawn()
    return raw.decode() if drawn is None else drawn.json(raw.decode())


def _plain(value: Any) -> Any:
    """Make JSON of what orjson does not know; sets get an order that every process gives them."""
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable_python(one) for one in value), key=orjson.dumps)
    return to_jsonable_python(value)


def load(adapter: TypeAdapter[Any] | None, text: str | None) -> Any:
    """Return the value of recorded JSON text."""
    if text is None:
        return None
    return orjson.loads(text) if adapter is None else adapter.validator.validate_json(text)


def read_back(adapter: TypeAdapter[Any] | None, text: str) -> Any:
    """Return what a replay will read; raises InvalidInput when the declared type refuses it."""
    try:
        return load(adapter, text)
    except ValidationError as error:
        raise InvalidInput(
            f"the result does not read back as declared: {_message(error)}",
            code="not_json",
            param="output",
        ) from error


def output_of(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """Return an adapter for a function's declared result, None when it declares nothing useful.

    What a function keeps alive, such as the frame around a closure, is let go with it.
    """
    if getattr(function, "__annotations__", {}).get("return") is None:
        return None
    try:
        if (known := _outputs.get(ref(function), _UNKNOWN)) is not _UNKNOWN:
            return known
        found = _outputs[ref(function, _forget)] = _declared_output(function)
        return found
    except TypeError:  # it cannot be referred to weakly
        return _declared_output(function)


def _forget(gone: ref[Callable[..., Any]]) -> None:
    _outputs.pop(gone, None)


def _declared_output(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    try:
        declared = get_type_hints(function, include_extras=True).get("return", Any)
    except (NameError, TypeError):
        return None
    if declared in (Any, None, type(None), bool, int, float, str, dict, list):
        return None
    return TypeAdapter(declared)


def dump_error(error: BaseException, step: str | None = None) -> dict[str, Json]:
    """Describe an error, veiled: class, code, message (cut at 2,000 characters), step and advice."""
    code = error.code if isinstance(error, MillpondError) else type(error).__name__
    described: dict[str, Json] = {
        "class": type(error).__name__,
        "code": readable(veiled(code)),
        "message": readable(veiled(_message(error))[:_MAX_MESSAGE]),
    }
    if step is not None:
        described["step"] = step
    if isinstance(error, MillpondError) and error.advice:
        described["advice"] = readable(veiled(error.advice))
    return described


def veiled(text: str) -> str:
    """Hide the values of secrets that the current run has opened in plain text."""
    drawn = veil.drawn()
    return text if drawn is None else drawn.text(text)


def readable(text: str) -> str:
    """Replace what Postgres cannot read back out of JSON: lone surrogates and the character 0."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def _message(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        # Without the input's values: they may be prompt text.
        places = [
            f"{'.'.join(map(str, one['loc'])) or 'value'}: {one['msg']}"
            for one in error.errors(include_input=False, include_url=False, include_context=False)
        ]
        return "; ".join(places)
    return str(error)
