"""Flows and steps as code registers them: names, versions, schemas, policies.

Called by flow modules through the decorators, by the worker to find code, by the CLI to list it.
Invariant: a (flow, version) and a step name stand for one function for the life of the process.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_type_hints

from pydantic import TypeAdapter

from millpond.errors import InvalidInput
from millpond.retry import DEFAULT_RETRY, Retry

P = ParamSpec("P")
R = TypeVar("R")

Effect = Literal["pure", "idempotent", "once"]
# Who is asked what became of a `once` step, unless it names another role.
ASK_ROLE = "operator"


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A registered async function that orchestrates steps.

    `on_failure` is called once a begun run is to end as failed or cancelled. `permission` is what starting
    it by API needs; None keeps the flow internal. `input` and `output` are adapters to and from JSON;
    `timeout_s` bounds the life of a run on the worker, per attempt; `deadline_s` the time from submit to
    the end, whatever the run does or waits for.
    """

    name: str
    version: int
    function: Callable[..., Awaitable[Any]]
    queue: str
    retry: Retry
    timeout_s: float | None
    permission: str | None
    input: TypeAdapter[Any]
    output: TypeAdapter[Any]
    description: str
    on_failure: Callable[..., Awaitable[Any]] | None = None
    deadline_s: float | None = None

    @property
    def capability(self) -> str:
        """What a worker must have to run this: `name@version`."""
        return capability(self.name, self.version)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[P, R]):
    """A registered step function: it takes a `StepContext` first, JSON-able arguments after it.

    `ask_role` is who decides where the outcome of a step with effect `once` is unknown.
    """

    name: str
    function: Callable[..., Awaitable[R]]
    retry: Retry
    timeout_s: float | None
    effect: Effect
    output: TypeAdapter[R]
    ask_role: str = ASK_ROLE


def capability(flow: str, version: int) -> str:
    """Name the ability to run one version of a flow."""
    return f"{flow}@{version}"


@dataclass
class Registry:
    """The flows and steps of one process."""

    flows: dict[tuple[str, int], Flow] = field(default_factory=dict)
    steps: dict[str, Step[Any, Any]] = field(default_factory=dict)

    def add_flow(self, flow: Flow) -> None:
        """Register a flow; a second function under the same name and version is refused."""
        known = self.flows.get((flow.name, flow.version))
        if known is not None and _origin(known.function) != _origin(flow.function):
            raise InvalidInput(f"flow {flow.capability} is registered twice", param="name")
        self.flows[flow.name, flow.version] = flow

    def add_step(self, step: Step[Any, Any]) -> None:
        """Register a step; a second function under the same name is refused."""
        known = self.steps.get(step.name)
        if known is not None and _origin(known.function) != _origin(step.function):
            raise InvalidInput(f"step {step.name} is registered twice", param="name")
        self.steps[step.name] = step

    def select(self, modules: Iterable[str]) -> list[Flow]:
        """Import `modules` and return every flow registered so far, by name and version."""
        for module in modules:
            importlib.import_module(module)
        return [self.flows[key] for key in sorted(self.flows)]


REGISTRY = Registry()


def flow(
    name: str,
    *,
    version: int = 1,
    queue: str = "default",
    retry: Retry = DEFAULT_RETRY,
    timeout_s: float | None = None,
    deadline_s: float | None = None,
    permission: str | None = None,
    input: Any = None,
    output: Any = None,
    on_failure: Callable[..., Awaitable[Any]] | None = None,
    registry: Registry = REGISTRY,
) -> Callable[[Callable[..., Awaitable[Any]]], Flow]:
    """Register an async function `(ctx, input)` as a flow.

    `on_failure` is an async function `(ctx, input, failure)`, called when a begun run is to end as failed
    or cancelled, after the undos of its steps. `retry` is for errors raised outside steps; `deadline_s`
    holds for runs started by API without one of their own. `input` and `output` are types that pydantic
    knows; left out, they are read from the function's annotations.
    """

    def register(function: Callable[..., Awaitable[Any]]) -> Flow:
        hints = _hints(function)
        parameters = list(inspect.signature(function).parameters)
        if len(parameters) != 2:
            raise InvalidInput(
                f"flow {name}: a function of two parameters is expected, (ctx, input)",
                param="function",
                advice="take the input also where the flow does not use it",
            )
        made = Flow(
            name=name,
            version=version,
            function=function,
            queue=queue,
            retry=retry,
            timeout_s=timeout_s,
            permission=permission,
            input=TypeAdapter(input if input is not None else hints.get(parameters[1], Any)),
            output=TypeAdapter(output if output is not None else hints.get("return", Any)),
            description=(function.__doc__ or "").strip(),
            on_failure=on_failure,
            deadline_s=deadline_s,
        )
        registry.add_flow(made)
        return made

    return register


def step(
    name: str,
    *,
    retry: Retry = DEFAULT_RETRY,
    timeout_s: float | None = 300.0,
    effect: Effect = "idempotent",
    ask_role: str = ASK_ROLE,
    registry: Registry = REGISTRY,
) -> Callable[[Callable[Concatenate[Any, P], Awaitable[R]]], Step[P, R]]:
    """Register an async function `(step: StepContext, …)` as a step for any flow to use.

    With effect `once` it is never run again unless it raised `NotDone`: where its outcome is unknown,
    somebody with `ask_role` is asked.
    """

    def register(function: Callable[Concatenate[Any, P], Awaitable[R]]) -> Step[P, R]:
        made: Step[P, R] = Step(
            name=name,
            function=function,
            retry=retry,
            timeout_s=timeout_s,
            effect=effect,
            output=TypeAdapter(_hints(function).get("return", Any)),
            ask_role=ask_role,
        )
        registry.add_step(made)
        return made

    return register


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)
