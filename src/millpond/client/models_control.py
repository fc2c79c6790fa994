"""What the server answers about what works: flows, queues, pauses, workers, reasons to wait.

Made by `calls` from JSON. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from pydantic import Field

from millpond.client.models import Answer


class Pause(Answer):
    """A pause that holds: of a `queue`, a `flow`, the `org`, or a queue for `everyone`."""

    id: str
    scope: str
    queue: str | None = None
    flow: str | None = None
    paused_by: str
    reason: str = ""
    paused_at: datetime


class OverriddenLimit(Answer):
    """What settings or code declare, and another limit of its key and kind stands above."""

    source: str
    set_by: str
    maximum: int
    period_s: float | None = None
    burst: int | None = None


class Limit(Answer):
    """A limit on a key: `maximum` at once, or (a `rate`) per `period_s` with up to `burst` at once.

    `source` is `api`, `settings` or `code`; `overrides`, what it stands above, are shown to operators.
    """

    id: str
    key: str
    kind: str
    maximum: int
    period_s: float | None = None
    burst: int | None = None
    is_of_platform: bool = False
    set_by: str = ""
    set_at: datetime
    source: str = "api"
    overrides: list[OverriddenLimit] = Field(default_factory=list)
    factor: float = 1.0


class Brake(Answer):
    """What holds back work on a key: `cooling` until then, `recovering`, or a breaker `open` or `half_open`.

    `factor` is the part of what limits allow that may go now.
    """

    id: str
    key: str
    is_of_platform: bool = False
    state: str
    until: datetime
    opened_at: datetime | None = None
    factor: float = 1.0
    recovers_at: datetime | None = None
    hits: int = 1
    step: str = ""
    reason: str = ""


class Saturation(Answer):
    """How full an org, a queue or what a limit counts is, and what of the org's work waits for room there.

    `own` of `in_use` places are the org's. Without `is_exact` as it was told last, or at least so many.
    `full_minute` and `full_hour` are for what part of that time it was full, None where no worker looked.
    """

    id: str
    of: str
    name: str
    limit: str | None = None
    kind: str | None = None
    is_of_platform: bool | None = None
    in_use: int | None = None
    maximum: int | None = None
    own: int
    is_exact: bool
    until: datetime | None = None
    waiting: int
    is_waiting_exact: bool
    oldest_s: float | None = None
    is_starved: bool = False
    full_minute: float | None = None
    full_hour: float | None = None


class PlatformSaturation(Answer):
    """How full a queue, a limit of the platform or an org is over all orgs, and what waits there.

    `keys` of one limit may stand behind a name; of their places those of the fullest are told. `orgs` is of how
    many work waits.
    """

    id: str
    of: str
    name: str
    limit: str | None = None
    kind: str | None = None
    keys: int = 1
    orgs: int | None = None
    in_use: int | None = None
    maximum: int | None = None
    is_exact: bool
    until: datetime | None = None
    waiting: int
    is_waiting_exact: bool
    oldest_s: float | None = None
    is_starved: bool = False
    full_minute: float | None = None
    full_hour: float | None = None


class UsedTokens(Answer):
    """Tokens that a run used of the model that these of its keys name; `is_lost`: perhaps more, a call was cut off."""

    keys: list[str] = Field(default_factory=list)
    tokens: int
    is_lost: bool = False


class RecordedRun(Answer):
    """A run that has ended: when it first could go, and how long workers had it (`worked_s`, waits left out).

    In the list of all orgs `id` is its place there. `tokens` is what it declared to need, `used` what it used; None
    where nobody knows.
    """

    id: str
    org: str | None = None
    flow: str
    version: int
    queue: str
    keys: list[str] = Field(default_factory=list)
    tokens: int | None = None
    used: list[UsedTokens] | None = None
    priority: int = 0
    urgency: str = "standard"
    ready_at: datetime
    started_at: datetime
    worked_s: float


class Resumed(Answer):
    """What a resume did: the queues in which work can go on."""

    was_paused: bool
    queues: list[str] = Field(default_factory=list)


class Flow(Answer):
    """A flow as its newest version has it."""

    id: str
    name: str
    version: int
    versions: list[int] = Field(default_factory=list)
    queue: str
    needs: dict[str, str] = Field(default_factory=dict)
    keys: list[str] = Field(default_factory=list)
    urgency: str = "standard"
    tokens: int | None = None
    permission: str | None = None
    may_start: bool = False
    is_served: bool = False
    description: str = ""
    input_schema: Any = None
    output_schema: Any = None
    timeout_s: float | None = None
    deadline_s: float | None = None
    published_at: datetime | None = None
    pauses: list[Pause] = Field(default_factory=list)


class Queue(Answer):
    """A queue as the caller's org sees it."""

    id: str
    name: str
    queued: int = 0
    is_depth_exact: bool = True
    oldest_s: float | None = None
    running: int = 0
    scheduled: int = 0
    waiting: int = 0
    awaiting_input: int = 0
    is_rest_exact: bool = True
    workers: int = 0
    slots: int = 0
    pauses: list[Pause] = Field(default_factory=list)


class Spill(Answer):
    """What is said of a worker's slots beyond their number: whom idle ones help, which are kept and reserved."""

    helps: dict[str, list[str]] = Field(default_factory=dict)
    keep: dict[str, int] = Field(default_factory=dict)
    reserve: dict[str, int] = Field(default_factory=dict)


class Worker(Answer):
    """A live worker process; `queues` and `in_use` count slots by queue."""

    id: uuid.UUID
    host: str
    pid: int
    release: str
    queues: dict[str, int] = Field(default_factory=dict)
    in_use: dict[str, int] = Field(default_factory=dict)
    spill: Spill = Field(default_factory=Spill)
    labels: dict[str, str] = Field(default_factory=dict)
    flows: list[str] = Field(default_factory=list)
    started_at: datetime
    heartbeat_age_s: float
    is_draining: bool = False


class WhyReason(Answer):
    """One reason; `facts` depend on its kind."""

    kind: str
    text: str
    reasons: list[WhyReason] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The further members, as docs/http.md lists them by kind."""
        return dict(self.model_extra or {})


class WhyEstimate(Answer):
    """When a run starts or goes on: `in_s` is None where that is not known, `basis` says from what, or why not.

    `is_least`: not before that, and perhaps later. `text` is for people.
    """

    in_s: float | None = None
    is_least: bool = False
    basis: str
    text: str


class Why(Answer):
    """Why a run does not run, or since when it does; `text` is for people."""

    run_id: uuid.UUID
    state: str
    text: str
    deadline_at: datetime | None = None
    reasons: list[WhyReason] = Field(default_factory=list)
    estimate: WhyEstimate | None = None
