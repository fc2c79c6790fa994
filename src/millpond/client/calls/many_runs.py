"""Calls that act on many runs by a filter, or tell how many that would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from millpond.client.call import Call, given, many, path_of, post, post_once, time_text
from millpond.client.models import BulkPreview, RunData

BulkAction = Literal["cancel", "rerun"]


def act_on_runs(
    action: BulkAction,
    *,
    states: str | Sequence[str] | None = None,
    flow: str | None = None,
    queue: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    q: str | None = None,
    labels: Mapping[str, str] | None = None,
    reason: str = "",
    skip_endings: bool = False,
    idempotency_key: str | None = None,
) -> Call[RunData]:
    """Cancel or rerun all runs that fit everything given, by a run of its own: follow that one.

    At least one member of the filter is given. `skip_endings` is as of a cancel. The result counts
    what was `matched`, `done`, `skipped` and in `errors`.
    """
    wanted = _filter(states, flow, queue, created_after, created_before, q, labels)
    told = {"reason": reason, "skip_endings": skip_endings, "dry_run": False}
    body = {"action": action, "filter": wanted, **told}
    return post_once(path_of("runs", "bulk"), RunData, body, key=idempotency_key)


def preview_bulk(
    action: BulkAction,
    *,
    states: str | Sequence[str] | None = None,
    flow: str | None = None,
    queue: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    q: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Call[BulkPreview]:
    """Do nothing and tell how many runs a bulk action would be for (its dry run), with some of them."""
    wanted = _filter(states, flow, queue, created_after, created_before, q, labels)
    body = {"action": action, "filter": wanted, "dry_run": True}
    return replace(post(path_of("runs", "bulk"), BulkPreview, body), is_same_twice=True)


def _filter(
    states: str | Sequence[str] | None,
    flow: str | None,
    queue: str | None,
    created_after: datetime | None,
    created_before: datetime | None,
    q: str | None,
    labels: Mapping[str, str] | None,
) -> dict[str, Any]:
    return given(
        {
            "states": many(states),
            "flow": flow,
            "queue": queue,
            "created_after": time_text(created_after),
            "created_before": time_text(created_before),
            "q": q,
            "labels": labels,
        }
    )
