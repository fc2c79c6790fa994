"""Arguments: a step's arguments as JSON text and back, by the annotations of its function.

Called by `context` for steps that go to another queue and by `step_tries` where they are executed.
Invariant: what `read` gives equals what `written` was given, as far as JSON and the annotations can tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

import orjson
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError

from millpond import veil
from millpond.engine.encoding import dump, dump_error
from millpond.engine.payloads import check_size
from millpond.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a step's function takes after its `StepContext`, each with its JSON form."""

    step: str
    signature: inspect.Signature
    adapters: Mapping[str, TypeAdapter[Any]]

    def written(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return arguments as JSON text; raises InvalidInput that names one which is no JSON, or shows a secret."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(f"step {self.step}: {error}", param=self.step) from error
        plain = {name: self._plain(name, value) for name, value in bound.arguments.items()}
        self._refuse_secrets(plain)
        text = dump(None, plain)
        check_size(text, f"the arguments of step {self.step}", param="arguments")
        self.read(text)
        return text

    def read(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments; raises InvalidInput that names one that does not fit."""
        bound = inspect.BoundArguments(self.signature, {})
        given = orjson.loads(text)
        for name in self.signature.parameters:
            if name in given:
                bound.arguments[name] = self._value(name, given.pop(name))
        if given:
            raise InvalidInput(
                f"step {self.step} takes no argument {next(iter(given))}",
                param=next(iter(given)),
                advice="let the workers of both queues have the same release of the step",
            )
        try:
            self.signature.bind(*bound.args, **bound.kwargs)
        except TypeError as error:
            raise InvalidInput(f"step {self.step}: {error}", param=self.step) from error
        return bound.args, dict(bound.kwargs)

    def _refuse_secrets(self, plain: Mapping[str, Any]) -> None:
        """Raise where a value would be hidden in what is stored, and useless where it arrives."""
        drawn = veil.current()
        for name, value in plain.items() if drawn else ():
            if drawn and drawn.value(value) != value:
                raise InvalidInput(
                    f"the argument {name} of step {self.step} shows a secret, and what goes to another queue is stored",
                    code="secret_in_argument",
                    param=name,
                    advice="open it there, by `await step.secret(name)`; a step in a process of its own gets it as an "
                    "argument only without another queue",
                )

    def _plain(self, name: str, value: Any) -> Any:
        try:
            return self.adapters[name].dump_python(value, mode="json", warnings="error")
        except (PydanticSerializationError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"the argument {name} of step {self.step}, a {type(value).__name__}, is no JSON by its "
                "annotation",
                code="not_json",
                param=name,
                advice="what goes to another queue is passed as JSON",
            ) from error

    def _value(self, name: str, value: Any) -> Any:
        try:
            return self.adapters[name].validate_json(orjson.dumps(value))
        except ValidationError as error:
            raise InvalidInput(
                f"the argument {name} of step {self.step} does not fit: {dump_error(error)['message']}",
                code="argument_mismatch",
                param=name,
            ) from error


@lru_cache(maxsize=4096)
def arguments_of(step: str, function: Callable[..., Any]) -> Arguments:
    """Return how the arguments of a step's function are written; raises InvalidInput where they cannot."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    hints = get_type_hints(function, include_extras=True)
    adapters = {one.name: _adapter(step, one, hints.get(one.name, Any)) for one in parameters}
    return Arguments(step, signature.replace(parameters=parameters), adapters)


def _adapter(step: str, parameter: inspect.Parameter, declared: Any) -> TypeAdapter[Any]:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        declared = tuple[declared, ...]
    elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
        declared = dict[str, declared]
    try:
        return TypeAdapter(declared)
    except PydanticUserError as error:
        raise InvalidInput(
            f"the argument {parameter.name} of step {step} has an annotation without a JSON form",
            param=parameter.name,
            advice="annotate it with a type that pydantic knows",
        ) from error
