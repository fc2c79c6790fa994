"""Flows and steps as code registers them: names, versions, schemas, policies.

Called by flow modules through the decorators, by the worker to find code, by the CLI to list it.
Invariant: a (flow, version) and a step name stand for one function for the life of the process.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    get_type_hints,
    overload,
)

from pydantic import TypeAdapter

from millpond.engine.arguments import arguments_of
from millpond.engine.declared import Limit, check_limits
from millpond.engine.keying import check_keys
from millpond.engine.manners import ASK_ROLE, Manner
from millpond.errors import InvalidInput
from millpond.retry import DEFAULT_RETRY, Retry
from millpond.types import INTERACTIVE, STANDARD, Urgency

P = ParamSpec("P")
R = TypeVar("R")

Effect = Literal["pure", "idempotent", "once"]
Place = Literal["loop", "thread", "process"]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A registered async function that orchestrates steps.

    `on_failure` is called once a begun run is to end as failed or cancelled. `permission` is what starting
    it by API needs; None keeps the flow internal. `input` and `output` are adapters to and from JSON;
    `timeout_s` bounds the life of a run on the worker, per attempt; `deadline_s` the time from submit to
    the end, whatever the run does or waits for. `needs` are labels that a worker must have to run it;
    `keys` are what its runs count on under limits, beside their org, queue and flow; `limits` are those of the
    platform that its code declares. Of an interactive `urgency` are flows for which somebody waits.
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
    needs: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    urgency: Urgency = STANDARD
    limits: tuple[Limit, ...] = ()

    @cached_property
    def capability(self) -> str:
        """What a worker must have to run this: `name@version`."""
        return capability(self.name, self.version)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[P, R]):
    """A registered step function: it takes a `StepContext` first, JSON-able arguments after it.

    `place` is where it executes; in a `queue` of its own, workers of that queue execute it; `needs` are
    labels that a worker must have for it. `ask_role` is who decides where the outcome of a step with
    effect `once` is unknown. `permission` is what the run's subject must hold when it acts, besides what starting
    the run took. `keys` are what each try of it counts on under limits, beside what its run does.
    """

    name: str
    function: Callable[..., Awaitable[R]] | Callable[..., R]
    retry: Retry
    timeout_s: float | None
    effect: Effect
    output: TypeAdapter[R]
    ask_role: str = ASK_ROLE
    place: Place = "loop"
    queue: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    permission: str | None = None
    keys: tuple[str, ...] = ()

    @cached_property
    def manner(self) -> Manner:
        """How it is to be performed."""
        return Manner(
            retry=self.retry,
            timeout_s=self.timeout_s,
            output=self.output,
            is_once=self.effect == "once",
            ask_role=self.ask_role,
            acts=self.acts,
            permission=self.permission,
            keys=self.keys,
            is_declared=True,
        )

    @property
    def acts(self) -> bool:
        """Whether it has an effect, for which the run's subject needs a right."""
        return self.effect != "pure"

    @property
    def capability(self) -> str:
        """What a worker must have to execute this for runs of other workers: `step:name`."""
        return f"step:{self.name}"


class Register(Protocol):
    """A decorator that makes a step of an async function or of a plain one."""

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Awaitable[R]], /) -> Step[P, R]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Step[P, R]: ...


def capability(flow: str, version: int) -> str:
    """Name the ability to run one version of a flow."""
    return f"{flow}@{version}"


def meets(labels: Mapping[str, str], needs: Mapping[str, str]) -> bool:
    """Whether a worker with these labels has what is needed."""
    return all(labels.get(name) == value for name, value in needs.items())


def place_of(function: Callable[..., Any]) -> Place:
    """Tell where a function executes that says nothing about it: plain ones in a thread."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:  # most are, so they ask no more
        return "loop"
    called = getattr(function, "__call__", None)  # noqa: B004 - an object's own method is asked for
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
    return "loop" if is_async else "thread"


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
    needs: Mapping[str, str] | None = None,
    keys: Sequence[str] = (),
    urgency: Urgency = STANDARD,
    tokens: int | None = None,
    limits: Sequence[Limit] = (),
    registry: Registry = REGISTRY,
) -> Callable[[Callable[..., Awaitable[Any]]], Flow]:
    """Register an async function `(ctx, input)` as a flow.

    `on_failure` is an async function `(ctx, input, failure)`, called when a begun run is to end as failed
    or cancelled, after the undos of its steps. `retry` is for errors raised outside steps; `deadline_s`
    holds for runs started without one of their own. `input` and `output` are types that pydantic knows;
    left out, they are read from the function's annotations. `needs` are labels, such as
    `{"gpu": "true"}`, without which a worker does not run it. `keys`, such as `provider:openai`, are what
    its runs count on under limits; their org, queue and flow they count on anyway. `tokens` is about how
    many one of them uses, where these are limited; left out, it is learned. `limits` are declared for all
    orgs as a worker starts that has the flow, such as `Limit("provider:openai", concurrency=20)`.
    Runs of an `urgency` of `"interactive"`, for which somebody waits, go before others, up to a bound.
    """

    if urgency not in (STANDARD, INTERACTIVE):
        raise InvalidInput(f"flow {name}: urgency is {STANDARD} or {INTERACTIVE}", param="urgency")

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
            needs=dict(needs or {}),
            keys=check_keys(keys, tokens=tokens),
            urgency=urgency,
            limits=check_limits(name, limits),
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
    runs_in: Place | None = None,
    queue: str | None = None,
    needs: Mapping[str, str] | None = None,
    permission: str | None = None,
    keys: Sequence[str] = (),
    tokens: int | None = None,
    registry: Registry = REGISTRY,
) -> Register:
    """Register a function `(step: StepContext, …)` as a step for any flow to use.

    With effect `once` it is never run again unless it raised `NotDone`: where its outcome is unknown,
    somebody with `ask_role` is asked. Such a step takes no `queue` and no `needs`: its run's worker executes it.

    An async function executes on the worker's event loop, a plain one in a thread, or with
    `runs_in="process"` in a child process. With a `queue` or `needs`, workers of that queue or with
    these labels execute it, as a work item of its own.

    Before each try of a step that is not `pure`, whoever the run acts for is looked up again: they need what
    starting the run took, and `permission` (`noun:verb`) where given. `keys`, such as `provider:openai`, are what each
    try counts on under limits: it waits for room on all of them, without a slot where nothing else of its run goes on.
    `tokens` is about how many a try uses, where those of its keys are limited; left out, it is learned.
    """

    def register(function: Callable[..., Any]) -> Step[Any, Any]:
        _check_step(name, function, runs_in, queue or needs)
        if effect == "once" and (queue or needs):
            raise once_elsewhere(name, "queue" if queue else "needs")
        made: Step[Any, Any] = Step(
            name=name,
            function=function,
            retry=retry,
            timeout_s=timeout_s,
            effect=effect,
            output=TypeAdapter(_hints(function).get("return", Any)),
            ask_role=ask_role,
            place=runs_in or place_of(function),
            queue=queue,
            needs=dict(needs or {}),
            permission=permission,
            keys=keys_of_step(name, keys, tokens),
        )
        registry.add_step(made)
        return made

    return register


def _check_step(
    name: str, function: Callable[..., Any], runs_in: Place | None, is_sent: object
) -> None:
    """Raise InvalidInput where a function cannot execute as its registration says."""
    if "queue" in inspect.signature(function).parameters:
        raise InvalidInput(
            f"step {name}: ctx.step takes `queue` for itself, so no parameter may have that name",
            param="queue",
        )
    natural = place_of(function)
    if runs_in is not None and (runs_in == "loop") != (natural == "loop"):
        raise InvalidInput(
            f"step {name}: async functions run in the loop, plain ones in a thread or a process",
            param="runs_in",
        )
    if runs_in == "process" and "<" in getattr(function, "__qualname__", "<"):
        raise InvalidInput(
            f"step {name}: what runs in a process is defined at the top of a module",
            param="runs_in",
        )
    if is_sent:
        arguments_of(name, function)


def keys_of_step(name: str, keys: Sequence[str], tokens: int | None) -> tuple[str, ...]:
    """Return what each try of a step counts on, with what it needs of tokens; raises InvalidInput."""
    if tokens is not None and not keys:
        raise InvalidInput(
            f"step {name}: tokens are of its keys, and it has none",
            param="tokens",
            advice="name the provider or the model in `keys`, or declare the tokens of the flow",
        )
    return check_keys(keys, tokens=tokens) if keys else ()


def once_elsewhere(name: str, param: str) -> InvalidInput:
    """Return why a step with effect `once` is executed by its run's own worker alone."""
    return InvalidInput(
        f"step {name} has effect once and cannot execute elsewhere",
        param=param,
        code="once_elsewhere",
        advice="give its flow that queue and those needs, or start a child run of a flow that has them",
    )


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)
