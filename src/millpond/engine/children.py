"""Child runs: `ctx.start` and `ctx.join`.

A part of `Context`. Invariant: a call finds its record, or has one made by `family`, so that neither a replay nor a
commit of unknown outcome starts two children.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from millpond.engine.checkpoints import Checkpoints
from millpond.engine.encoding import dump, dump_error, load, veiled
from millpond.engine.family import Birth, Join, Wish
from millpond.engine.fanning import fan
from millpond.engine.history import Recorded
from millpond.engine.keying import check_keys
from millpond.engine.plans import StepFailed, failure
from millpond.engine.registry import Flow
from millpond.engine.submit import deadline_of
from millpond.errors import InvalidInput
from millpond.types import (
    INTERACTIVE,
    ClosePolicy,
    Json,
    Urgency,
    lesser,
)


class ChildFailed(StepFailed):
    """A child run failed or was cancelled: `outcome` says which, `error` what its run says."""

    def __init__(self, step: str, described: Mapping[str, Json]) -> None:
        super().__init__(
            step,
            error_class="ChildFailed",
            code=str(described.get("code", "")),
            message=str(described.get("message", "")),
        )
        self.run_id = uuid.UUID(str(described["run_id"]))
        self.outcome = str(described.get("outcome", ""))
        self.error = described.get("error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A child run, to be joined; `close` is what the end of its parent means for it."""

    run_id: uuid.UUID
    flow: str
    name: str
    step_key: str
    close: ClosePolicy
    output: TypeAdapter[Any] | None


class Children(Checkpoints):
    """The calls that start and join child runs."""

    _unjoined: dict[str, Child]

    async def start(
        self,
        flow: Flow | str,
        input: Any = None,
        *,
        name: str | None = None,
        version: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        urgency: Urgency = INTERACTIVE,
        labels: Mapping[str, str] | None = None,
        keys: Sequence[str] = (),
        tokens: int | None = None,
        delay_s: float = 0.0,
        deadline_s: float | None = None,
        timeout_s: float | None = None,
        close: ClosePolicy = "cancel",
        output: Any = None,
    ) -> Child:
        """Start a run of a flow, or of the flow published under a name, as a child of this run.

        It has this run's org, subject, labels and priority where others are not given, and is interactive where its
        flow and this run are, unless `urgency` says standard. `close`: when this
        run ends, the child is cancelled, is left alone (`abandon`), or this run's end waits for it
        (`wait`). `output` is the type of its result where the flow is named by text.
        """
        wish = Wish(
            flow=flow if isinstance(flow, str) else flow.name,
            version=version if isinstance(flow, str) else flow.version,
            queue=queue if isinstance(flow, str) or queue else flow.queue,
            timeout_s=timeout_s if isinstance(flow, str) or timeout_s else flow.timeout_s,
            is_by_name=isinstance(flow, str),
            input=encode_input(None if isinstance(flow, str) else flow.input, input),
            priority=priority,
            urgency=urgency if isinstance(flow, str) else lesser(urgency, flow.urgency),
            labels=None if labels is None else orjson.loads(dump(None, labels)),
            keys=check_keys(
                [veiled(one) for one in keys],
                declared=() if isinstance(flow, str) else flow.keys,
                tokens=tokens,
            ),
            delay_s=delay_s,
            deadline_s=deadline_of(
                None if isinstance(flow, str) else flow.deadline_s,
                given_s=deadline_s,
                delay_s=delay_s,
            ),
            close=close,
        )
        key = self._branches.here().key(name or wish.flow)
        recorded = self._lookup(key, "child")
        if recorded is not None and recorded.state == "failed":
            raise failure(name or wish.flow, orjson.loads(recorded.error or "{}"))
        if recorded is None:
            await self._permit(key, name or wish.flow)
            birth = Birth(
                lease=self._lease,
                step_key=key,
                seq=self._branches.place(key),
                name=name or wish.flow,
                wish=wish,
            )
            run_id, woken = await self._performer.persist(
                lambda: self._performer.asked(self._scope.family.start(birth))
            )
            self._scope.hints.wake([woken] if woken else [])
        else:
            run_id = uuid.UUID(orjson.loads(recorded.output or "{}")["run_id"])
        adapter = flow.output if isinstance(flow, Flow) else None
        child = Child(
            run_id=run_id,
            flow=wish.flow,
            name=name or wish.flow,
            step_key=key,
            close=close,
            output=adapter if output is None else TypeAdapter(output),
        )
        if close == "wait":
            self._unjoined[key] = child
        return child

    async def _permit(self, key: str, name: str) -> None:
        """Record a refusal and raise it where the run may not start a child for its subject any more."""
        refused = await self._performer.refusal(key, name)
        if refused is None:
            return
        described = dump_error(refused, name)
        text = orjson.dumps(described).decode()
        data = {"name": name, "tries": 1, "error": described}
        await self._performer.record(
            key, name, "step.failed", data, kind="child", state="failed", error=text
        )
        raise failure(name, described) from refused

    async def join(self, child: Child) -> Any:
        """Wait, holding nothing, for a child's end and return its output; raises ChildFailed.

        A child that continues as another run is followed to the last one.
        """
        key = self._branches.here().key(f"join {child.name}")
        recorded = await self._end_of(child, key)
        self._unjoined.pop(child.step_key, None)
        if recorded.state == "failed":
            raise ChildFailed(child.name, orjson.loads(recorded.error or "{}"))
        return load(child.output, recorded.output)

    async def run_flow(self, flow: Flow | str, input: Any = None, **options: Any) -> Any:
        """Start a child and join it; takes what `start` takes."""
        return await self.join(await self.start(flow, input, **options))

    async def settle_children(self) -> None:
        """Wait for the children whose end this run's end waits for, however they end."""
        if not self._unjoined:
            return
        left = [self._unjoined[key] for key in sorted(self._unjoined)]
        # Under keys of their own, so that they are the same wherever the flow ends.
        waits_for = [partial(self._end_of, child, f"!join {child.step_key}") for child in left]
        await fan(self._branches, waits_for, catch_up=self._catch_up)
        self._unjoined.clear()

    async def _end_of(self, child: Child, key: str) -> Recorded:
        join = Join(
            lease=self._lease,
            step_key=key,
            seq=self._branches.place(key),
            name=child.name,
            child_id=child.run_id,
        )
        return await self._outcome_of(
            key, "join", lambda: self._performer.asked(self._scope.family.join(join))
        )


def encode_input(adapter: TypeAdapter[Any] | None, value: Any) -> bytes:
    """Return an input as JSON; raises InvalidInput when it does not fit the flow's type."""
    if adapter is None:
        return dump(None, value).encode()
    try:
        return dump(adapter, adapter.validate_python(value)).encode()
    except ValidationError as error:
        raise InvalidInput(
            f"the input does not fit: {dump_error(error)['message']}", param="input"
        ) from error
