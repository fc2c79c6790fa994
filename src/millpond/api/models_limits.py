"""Models of limits on keys.

Called by the routes of these. Invariant: request models are strict and refuse fields that they do not know.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from millpond.api.texts import LongWord
from millpond.types import Urgency

_MOST = 2**31 - 1
LimitKind = Literal["concurrency", "rate", "tokens"]


class PutLimit(BaseModel):
    """A wish to set a limit: one of its key and kind is replaced."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: LongWord = Field(
        description="What is limited: `noun:name`, `noun:*` for each name by itself, or two of "
        "these with `×` (or ` x `) between, such as `org:* × provider:openai`."
    )
    kind: LimitKind = Field(
        "concurrency",
        description="How much at once, how many starts in a time, or how many tokens of models in a time.",
    )
    maximum: int = Field(ge=0, le=_MOST, description="0 lets nothing go.")
    period_s: float | None = Field(
        None,
        gt=0,
        le=86_400 * 31,
        allow_inf_nan=False,
        description="Of a rate: `maximum` starts in so many seconds; of tokens: so many of them.",
    )
    burst: int | None = Field(
        None,
        ge=1,
        le=_MOST,
        description="Of a rate: how many may start at once; unset: 1. Of tokens: how many at once; unset: `maximum`.",
    )


Source = Literal["api", "settings", "code"]


class OverriddenLimit(BaseModel):
    """What settings or code declare, and another limit of its key and kind stands above."""

    source: Source
    set_by: str = Field(description="Which host's settings, or which flow.")
    maximum: int
    period_s: float | None
    burst: int | None


class LimitOut(BaseModel):
    """A limit on a key."""

    id: str = Field(description="Its kind and key.")
    object: Literal["limit"]
    key: str
    kind: LimitKind
    maximum: int
    period_s: float | None
    burst: int | None
    is_of_platform: bool = Field(
        description="Set by an operator; the organization cannot change it."
    )
    set_by: str = Field(
        description="Who set it last; where that is not the organization's, `operator`, `settings` or `code`."
    )
    set_at: datetime
    source: Source = Field(
        description="Set by a request, declared by the installation's settings, or by the code of a flow: each stands "
        "above those after it."
    )
    overrides: list[OverriddenLimit] = Field(
        description="What it stands above, what would hold without it first; shown to operators."
    )
    factor: float = Field(
        description="Which part of it is allowed now: less than 1 while its key cools down or recovers."
    )


class BrakeOut(BaseModel):
    """What holds back work on a key after its provider was asked too much, or failed too often."""

    id: str = Field(description="Whose work it holds back, and its key.")
    object: Literal["brake"]
    key: str
    is_of_platform: bool = Field(
        description="It holds back everybody's work; an operator takes it off."
    )
    state: Literal["cooling", "open", "half_open", "recovering", "over"] = Field(
        description="`cooling`: nothing goes before `until`; `recovering`: a part goes. Of a breaker `open`: nothing "
        "goes before `until`; `half_open`: one run at a time probes."
    )
    until: datetime = Field(description="Before this nothing goes.")
    opened_at: datetime | None = Field(description="Since when its breaker is open.")
    factor: float = Field(description="Which part of what its limits allow may go now.")
    recovers_at: datetime | None = Field(
        description="When all is allowed again; unknown while a breaker is open."
    )
    hits: int = Field(description="The how-manieth cooldown, or opening, in a row it is.")
    step: str = Field(description="The step by which it was noticed.")
    reason: str = Field(description="The code of that step's error.")


class SaturationOut(BaseModel):
    """How full one thing is, and what of the organization's work waits for room there."""

    id: str
    object: Literal["saturation"]
    of: Literal["org", "queue", "limit"]
    name: str = Field(description="The slug, the queue, or the key that the limit counts.")
    limit: str | None = Field(description="The limit's key, which may be a pattern.")
    kind: LimitKind | None
    is_of_platform: bool | None = Field(description="Whether an operator set the limit.")
    in_use: int | None = Field(
        description="Places or slots taken, by all organizations that share them; null for a rate and tokens."
    )
    maximum: int | None = Field(description="How many there are; null where nothing limits.")
    own: int = Field(description="How many of them the organization's work has.")
    is_exact: bool = Field(
        description="False: as a worker or a claim last told it, or at least so many."
    )
    until: datetime | None = Field(description="Of a rate or tokens: when it lets the next one go.")
    waiting: int = Field(
        description="Work items of the organization that are ready and have no room."
    )
    is_waiting_exact: bool = Field(description="False: at least so many wait.")
    oldest_s: float | None = Field(description="For how long the oldest of them has been ready.")
    is_starved: bool = Field(description="Whether that is longer than `starved_after_s`.")
    full_minute: float | None = Field(
        description="For what part of the last minute it was full: a limit without a place, a queue without a free "
        "slot while work waited, an organization with work under a full limit. Null where no worker looked."
    )
    full_hour: float | None = Field(description="The same of the last hour.")


class PlatformSaturationOut(BaseModel):
    """How full one thing is, over all organizations, and what waits for room there."""

    id: str
    object: Literal["platform_saturation"]
    of: Literal["org", "queue", "limit"]
    name: str = Field(
        description="The slug, the queue, or the key that the limit counts: with `*` where callers alone gave it."
    )
    limit: str | None = Field(description="The limit's key, which may be a pattern.")
    kind: LimitKind | None
    keys: int = Field(
        description="How many keys stand behind the name; of their places those of the fullest are told."
    )
    orgs: int | None = Field(description="Of how many organizations work waits; null for a limit.")
    in_use: int | None = Field(description="Places or slots taken; null for a rate.")
    maximum: int | None = Field(description="How many there are; null where nothing limits.")
    is_exact: bool = Field(description="False: as workers last told it.")
    until: datetime | None = Field(description="Of a rate: when it lets the next one go.")
    waiting: int = Field(description="Work items that are ready and have no room.")
    is_waiting_exact: bool = Field(description="False: at least so many wait.")
    oldest_s: float | None = Field(description="For how long the oldest of them has been ready.")
    is_starved: bool = Field(description="Whether that is longer than `starved_after_s`.")
    full_minute: float | None = Field(
        description="For what part of the last minute it was full, the fullest of its keys; "
        "null where no worker looked."
    )
    full_hour: float | None = Field(description="The same of the last hour.")


class UsedTokens(BaseModel):
    """Tokens that a run used, in all of its steps."""

    keys: list[str] = Field(
        description="Which of the run's keys (provider, model) the model stands for; none where it has no such key. "
        "`provider:` or `model:` alone: another one, which is a key of its step."
    )
    tokens: int = Field(description="Input and output together.")
    is_lost: bool = Field(
        description="Whether a call was cut off, so that it may have used more than was told."
    )


class RecordedRun(BaseModel):
    """A run that has ended, as a replay of limits needs it."""

    id: str = Field(description="The run's; in the list of all orgs its place there.")
    object: Literal["recorded_run"]
    org: str | None = Field(description="The org's slug, in the list of all orgs.")
    flow: str
    version: int
    queue: str
    keys: list[str]
    tokens: int | None = Field(
        description="How many it declared to need of limits on tokens; null where it declared nothing."
    )
    used: list[UsedTokens] | None = Field(
        description="What it used of tokens; null where nobody knows: it ended before that was recorded, "
        "or no worker ended it."
    )
    priority: int
    urgency: Urgency
    ready_at: datetime = Field(description="When it first could go.")
    started_at: datetime
    worked_s: float = Field(
        description="How long workers had it, in seconds; its waits in between are left out."
    )
