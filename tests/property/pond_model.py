"""A plain model of what the engine must do, beside which the state machine runs the real one.

Pure: it knows runs, workers and timers as a reader of docs/concepts.md would, and no SQL.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from millpond.engine.lanes import SUSPECT_DEATHS
from millpond.engine.leases import Lease

SLOTS = 3


@dataclass
class ModelRun:
    """One run: its state, what was recorded, and the kinds of its events in order."""

    org_id: int
    run_id: uuid.UUID
    state: str
    kinds: list[str]
    attempt: int = 0
    deaths: int = 0
    is_cancel_requested: bool = False
    lease: Lease | None = None
    worker_id: uuid.UUID | None = None
    steps: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    timers: dict[str, str] = field(default_factory=dict)
    due: set[str] = field(default_factory=set)
    request_id: uuid.UUID | None = None

    @property
    def is_live(self) -> bool:
        """Whether the run has not ended."""
        return self.state not in ("succeeded", "failed", "cancelled")

    def came_to_a_wait(self) -> None:
        """Note that a suspect, which is executed alone, did not take its process down."""
        self.deaths = 0 if self.deaths >= SUSPECT_DEATHS else self.deaths

    def next_key(self, name: str) -> str:
        """Return a step key that the run has not used."""
        return f"{name}:{len(self.steps)}"


@dataclass
class ModelWorker:
    """One worker session; `is_gone` once it was rescued from."""

    worker_id: uuid.UUID
    is_expired: bool = False
    is_gone: bool = False


@dataclass
class Model:
    """All runs and workers, and the leases that hold no more."""

    runs: dict[uuid.UUID, ModelRun] = field(default_factory=dict)
    workers: list[ModelWorker] = field(default_factory=list)
    stale: list[Lease] = field(default_factory=list)

    def of(self, *states: str) -> list[ModelRun]:
        """Return the runs in one of these states, oldest first."""
        return [run for run in self.runs.values() if run.state in states]

    def in_use(self, worker: ModelWorker) -> int:
        """Count the runs that a worker holds."""
        return sum(run.worker_id == worker.worker_id for run in self.runs.values())

    def claimed(self, lease: Lease, worker: ModelWorker) -> None:
        """Note a claim; only a queued run can be claimed, with the next attempt."""
        run = self.runs[lease.run_id]
        assert run.state == "queued", f"claimed while {run.state}"
        assert lease.attempt == run.attempt + 1
        run.attempt = lease.attempt
        run.state, run.lease, run.worker_id = "running", lease, worker.worker_id
        run.kinds.append("run.started" if lease.attempt == 1 else "run.resumed")

    def unleased(self, run: ModelRun, state: str) -> None:
        """Note that a run goes on in another state without its lease, which is stale from now on."""
        if run.lease is not None:
            self.stale.append(run.lease)
        run.state, run.lease, run.worker_id = state, None, None

    def parked(self, run: ModelRun, state: str, *, is_over: bool) -> None:
        """Note a parking: a run whose wait is over, or that shall stop, is queued instead."""
        run.came_to_a_wait()
        if is_over or run.is_cancel_requested:
            self.unleased(run, "queued")
        else:
            self.unleased(run, state)
            run.kinds.append(f"run.{state}")

    def ended(self, run: ModelRun, outcome: str) -> None:
        """Note the end of a run, which takes its waits along."""
        self.unleased(run, outcome)
        run.timers.clear()
        run.request_id = None
        run.kinds.append(f"run.{outcome}")

    def fired(self) -> None:
        """Note that what was due took effect; of several timers of a run, sleeps are told of first."""
        for run in self.runs.values():
            due = [(kind != "sleep", key) for key, kind in run.timers.items() if key in run.due]
            for _, key in sorted(due):
                self._took_effect(run, key)
            if due and run.state != "running":
                run.state = "queued"
            run.due.clear()

    def _took_effect(self, run: ModelRun, key: str) -> None:
        kind = run.timers.pop(key)
        if kind == "sleep":
            run.steps[key] = "done"
            run.kinds.append("sleep.ended")
        elif kind == "expiry":
            run.steps[key] = "failed"
            run.request_id = None
            run.kinds.append("input.expired")
        elif kind == "start":
            run.kinds.append("run.queued")

    def rescued(self) -> None:
        """Note a rescue: what expired workers held is queued again or, if a suspect, has failed; and they are gone."""
        for worker in self.workers:
            if worker.is_expired:
                worker.is_gone = True
                for run in self.runs.values():
                    if run.worker_id != worker.worker_id:
                        continue
                    if run.deaths >= SUSPECT_DEATHS:
                        self.ended(run, "failed")
                    else:
                        run.deaths += 1
                        run.kinds.append("run.rescued")
                        self.unleased(run, "queued")
