"""The catalog: flows and queues as workers published them, kept for two seconds.

Called by the accept path and `/v1/flows`. Invariants: what it tells is at most `MAX_AGE_S` old; a
schema is compiled once per flow version; nothing is ever fetched for a `$ref`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jsonschema_rs

from millpond.db.pool import Database
from millpond.engine.views import FlowView, list_flows, served_queues
from millpond.errors import InvalidInput, NotFound, Permanent
from millpond.types import Json

MAX_AGE_S = 2.0
_MISS_AGE_S = 0.1  # a flow not found is looked for again when the catalog is older than this
_MAX_FAULTS = 20


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    flows: Mapping[str, Mapping[int, FlowView]]
    queues: frozenset[str]
    read_at: float


class Catalog:
    """Published flows and served queues, read at most every two seconds."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._snapshot = _Snapshot(flows={}, queues=frozenset(), read_at=float("-inf"))
        self._reading = asyncio.Lock()
        self._validators: dict[tuple[str, int], tuple[Json, jsonschema_rs.Validator]] = {}

    async def flow(self, name: str, version: int | None = None) -> FlowView:
        """Return a flow's version, or its newest; raises NotFound with advice."""
        flow = _find(await self._fresh(MAX_AGE_S), name, version)
        if flow is None:
            flow = _find(await self._fresh(_MISS_AGE_S), name, version)
        if flow is None:
            wanted = name if version is None else f"{name}@{version}"
            raise NotFound(
                f"no worker has published the flow {wanted}",
                code="flow_not_found",
                param="flow" if version is None else "version",
                advice="start a worker with `--flows <module>` that registers it; "
                "`GET /v1/flows` lists what is known",
            )
        return flow

    async def flows(self) -> list[list[FlowView]]:
        """Return all flows by name, each with its versions, oldest first."""
        snapshot = await self._fresh(MAX_AGE_S)
        return [list(versions.values()) for versions in snapshot.flows.values()]

    async def versions(self, name: str) -> list[FlowView]:
        """Return all versions of a flow, oldest first; raises NotFound with advice."""
        await self.flow(name)
        return list(self._snapshot.flows[name].values())

    async def check_queue(self, queue: str, flow: FlowView) -> None:
        """Raise InvalidInput unless a live worker serves `queue` or the flow names it."""
        if queue == flow.queue or queue in (await self._fresh(MAX_AGE_S)).queues:
            return
        served = (await self._fresh(_MISS_AGE_S)).queues
        if queue not in served:
            known = ", ".join(sorted({*served, flow.queue}))
            raise InvalidInput(
                f"no live worker serves a queue of this name; known now: {known}",
                code="queue_unknown",
                param="queue",
            )

    def check_input(self, flow: FlowView, document: Json) -> None:
        """Raise InvalidInput that names each part of `document` the flow's schema refuses."""
        validator = self._validator(flow)
        if validator.is_valid(document):
            return
        faults = [_fault(e) for e in islice(validator.iter_errors(document), _MAX_FAULTS)]
        named = "; ".join(f"{fault['param']}: {fault['message']}" for fault in faults)
        raise InvalidInput(
            f"The input does not fit {flow.name}@{flow.version}: {named}",
            code="input_mismatch",
            param=faults[0]["param"],
            details={"errors": faults},
        )

    def _validator(self, flow: FlowView) -> jsonschema_rs.Validator:
        key = (flow.name, flow.version)
        known = self._validators.get(key)
        if known is not None and (known[0] is flow.input_schema or known[0] == flow.input_schema):
            return known[1]
        try:
            made = jsonschema_rs.validator_for(flow.input_schema, mask="the value", offline=True)
        except ValueError as error:
            raise Permanent(
                f"the published input schema of {flow.name}@{flow.version} cannot be used",
                code="flow_schema_broken",
            ) from error
        self._validators[key] = flow.input_schema, made
        return made

    async def _fresh(self, max_age_s: float) -> _Snapshot:
        """Return a snapshot no older than this; one caller reads, the others wait for it."""
        asked_at = time.monotonic()
        if asked_at - self._snapshot.read_at <= max_age_s:
            return self._snapshot
        async with self._reading:
            if asked_at - self._snapshot.read_at > max_age_s:
                self._snapshot = await self._read(time.monotonic())
            return self._snapshot

    async def _read(self, read_at: float) -> _Snapshot:
        async with self._db.globals() as con:
            flows = await list_flows(con)
            queues = frozenset(await served_queues(con))
        return _Snapshot(flows=_by_name(flows), queues=queues, read_at=read_at)


def _by_name(flows: Sequence[FlowView]) -> Mapping[str, Mapping[int, FlowView]]:
    found: dict[str, dict[int, FlowView]] = {}
    for flow in flows:
        found.setdefault(flow.name, {})[flow.version] = flow
    return found


def _find(snapshot: _Snapshot, name: str, version: int | None) -> FlowView | None:
    versions = snapshot.flows.get(name)
    if not versions:
        return None
    return versions.get(max(versions) if version is None else version)


def _fault(error: jsonschema_rs.ValidationError) -> dict[str, Any]:
    """Name the part at fault as `input.customer.0.name`; the value itself is never repeated."""
    path = ["input", *map(str, error.instance_path)]
    message = error.message
    match error.kind:
        case jsonschema_rs.ValidationErrorKind.Required(property=name):
            path.append(str(name))
            message = "is required"
        case jsonschema_rs.ValidationErrorKind.AdditionalProperties(unexpected=names):
            path.append(str(names[0]))
            message = "is not expected here"
    return {"param": ".".join(path), "code": error.kind.name, "message": message}
