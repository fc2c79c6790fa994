"""Calls about limits on keys, of the org and of the platform."""

from __future__ import annotations

from datetime import datetime

from millpond.client.call import (
    Call,
    Id,
    get,
    given,
    id_text,
    path_of,
    read_nothing,
    reader,
    time_text,
)
from millpond.client.models import Page
from millpond.client.models_control import (
    Brake,
    Limit,
    PlatformSaturation,
    RecordedRun,
    Saturation,
)


def list_limits() -> Call[Page[Limit]]:
    """What limits the org's work: its own limits, and the platform's that hold for it."""
    return get(path_of("limits"), Page[Limit])


def put_limit(
    key: str,
    maximum: int,
    *,
    kind: str = "concurrency",
    period_s: float | None = None,
    burst: int | None = None,
) -> Call[Limit]:
    """Set a limit on the org's own work; `rate` and `tokens` are so many per `period_s`, up to `burst` at once."""
    return _put(path_of("limits"), key, maximum, kind, period_s, burst)


def delete_limit(key: str, *, kind: str = "concurrency") -> Call[None]:
    """Remove a limit on the org's own work."""
    return _delete(path_of("limits"), key, kind)


def list_saturation(*, starved_after_s: float | None = None) -> Call[Page[Saturation]]:
    """How full the org, its queues and the limits are that its work meets, and what waits for room there."""
    return get(path_of("limits", "saturation"), Page[Saturation], starved_after_s=starved_after_s)


def list_recorded_runs(
    *,
    since: datetime | None = None,
    queue: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
) -> Call[Page[RecordedRun]]:
    """Ended runs as a replay of limits needs them, newest first; unset: made in the last 24 hours."""
    return get(
        path_of("limits", "recorded-runs"),
        Page[RecordedRun],
        since=time_text(since),
        queue=queue,
        limit=limit,
        after=id_text(after),
    )


def list_brakes() -> Call[Page[Brake]]:
    """What holds back the org's work: keys that cool down or recover, and open breakers."""
    return get(path_of("limits", "brakes"), Page[Brake])


def delete_brake(key: str) -> Call[None]:
    """Take a brake off the org's own work."""
    return _release(path_of("limits", "brakes"), key)


def list_platform_brakes() -> Call[Page[Brake]]:
    """What holds back everybody's work."""
    return get(path_of("platform", "limits", "brakes"), Page[Brake])


def delete_platform_brake(key: str) -> Call[None]:
    """Take a brake off everybody's work."""
    return _release(path_of("platform", "limits", "brakes"), key)


def list_platform_limits() -> Call[Page[Limit]]:
    """What the platform limits, for all orgs together or for each."""
    return get(path_of("platform", "limits"), Page[Limit])


def list_platform_saturation(
    *,
    of: str | None = None,
    starved_after_s: float | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[Page[PlatformSaturation]]:
    """How full all queues, the platform's limits and orgs are, by name; `of` is `queue`, `limit` or `org`."""
    return get(
        path_of("platform", "limits", "saturation"),
        Page[PlatformSaturation],
        of=of,
        starved_after_s=starved_after_s,
        limit=limit,
        after=after,
    )


def list_platform_recorded_runs(
    *,
    since: datetime | None = None,
    queue: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[Page[RecordedRun]]:
    """Ended runs of all orgs as a replay of limits needs them, by org, oldest first."""
    return get(
        path_of("platform", "limits", "recorded-runs"),
        Page[RecordedRun],
        since=time_text(since),
        queue=queue,
        limit=limit,
        after=after,
    )


def put_platform_limit(
    key: str,
    maximum: int,
    *,
    kind: str = "concurrency",
    period_s: float | None = None,
    burst: int | None = None,
) -> Call[Limit]:
    """Set a limit for everybody: on a key over all orgs, or with `org:*` or `org:slug` on each or one."""
    return _put(path_of("platform", "limits"), key, maximum, kind, period_s, burst)


def delete_platform_limit(key: str, *, kind: str = "concurrency") -> Call[None]:
    """Remove a limit of the platform."""
    return _delete(path_of("platform", "limits"), key, kind)


def _put(
    path: str, key: str, maximum: int, kind: str, period_s: float | None, burst: int | None
) -> Call[Limit]:
    body = {"key": key, "kind": kind, "maximum": maximum}
    body |= given({"period_s": period_s, "burst": burst})
    return Call(method="PUT", path=path, read=reader(Limit), body=body)


def _delete(path: str, key: str, kind: str) -> Call[None]:
    return Call(method="DELETE", path=path, read=read_nothing, params={"key": key, "kind": kind})


def _release(path: str, key: str) -> Call[None]:
    return Call(method="DELETE", path=path, read=read_nothing, params={"key": key})
