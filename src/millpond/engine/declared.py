"""Declared: limits of the platform as flows' code says them. Pure.

Called by flow modules, `registry` and `declaring`. Invariant: what is made here can be read as limits; whether they fit
is checked before the first of them is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from millpond.engine.keying import parse_key
from millpond.engine.rules import Kind, Rule
from millpond.errors import InvalidInput
from millpond.types import NO_ORG

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limit:
    """A ceiling on a key that a flow's code declares for all orgs: `Limit("provider:openai", concurrency=20)`.

    `rate` and `tokens` are so many per `period_s` seconds, and up to `burst` at once; not given, 1 of a rate, and of
    tokens all. Several may be given. An operator's limit, and one of the settings, stand above it.
    """

    key: str
    concurrency: int | None = field(default=None, kw_only=True)
    rate: int | None = field(default=None, kw_only=True)
    tokens: int | None = field(default=None, kw_only=True)
    period_s: float = field(default=60.0, kw_only=True)
    burst: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise InvalidInput for what is no limit."""
        parse_key(self.key)
        if self.concurrency is None and self.rate is None and self.tokens is None:
            raise _unfit(self, "it says neither `concurrency` nor `rate` nor `tokens`")
        burst = None if self.burst is None else self.burst - 1
        for count in (self.concurrency, self.rate, self.tokens, burst):
            if count is not None and not 0 <= count < _MOST:
                raise _unfit(self, f"{count} is no count")
        if not self.period_s > 0:
            raise _unfit(self, "`period_s` is above 0")

    @property
    def rules(self) -> Sequence[Rule]:
        """The limits that it says, of the platform."""
        key = parse_key(self.key)
        found = []
        if self.concurrency is not None:
            found.append(Rule(owner=NO_ORG, key=key, kind="concurrency", maximum=self.concurrency))
        per_period: Sequence[tuple[Kind, int | None, int]] = (
            ("rate", self.rate, 1),
            ("tokens", self.tokens, max(1, self.tokens or 0)),
        )
        for kind, maximum, burst in per_period:
            if maximum is not None:
                found.append(
                    Rule(
                        owner=NO_ORG,
                        key=key,
                        kind=kind,
                        maximum=maximum,
                        period_s=self.period_s,
                        burst=self.burst or burst,
                    )
                )
        return found


def check_limits(flow: str, limits: Sequence[Limit]) -> tuple[Limit, ...]:
    """Return the limits of a flow; raises InvalidInput where it says two about one thing."""
    said: set[tuple[str, Kind]] = set()
    for rule in (rule for limit in limits for rule in limit.rules):
        if (rule.key, rule.kind) in said:
            raise InvalidInput(
                f"flow {flow} declares a {rule.kind} limit on {rule.key} twice", param="limits"
            )
        said.add((rule.key, rule.kind))
    return tuple(limits)


def _unfit(limit: Limit, why: str) -> InvalidInput:
    return InvalidInput(
        f"Limit({limit.key!r}): {why}",
        param="limits",
        advice="write Limit('provider:openai', concurrency=20), rate=600, period_s=60, burst=10, "
        "or tokens=90000, period_s=60",
    )
