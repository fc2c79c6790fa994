"""Calls about events from outside, for the triggers that listen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Required, TypedDict

from millpond.client.call import Call, get, given, new_key, path_of, post, post_once
from millpond.client.models import Page
from millpond.client.models_calendar import InboundEvent, InboundEvents

_ROOT = "events"


class EventWish(TypedDict, total=False):
    """One of many events to send: what `send` takes, as a dictionary."""

    name: Required[str]
    data: Any
    id: str | None


def send_event(
    name: str, data: Any = None, *, id: str | None = None, idempotency_key: str | None = None
) -> Call[InboundEvent]:
    """Send an event; the answer has the runs that it started at once.

    Its `id` is unique in the org: for a repeat, the answer is that of the first.
    """
    body = {"name": name, "data": data, **given({"id": id})}
    return post_once(path_of(_ROOT), InboundEvent, body, key=idempotency_key)


def send_events(events: Sequence[EventWish]) -> Call[InboundEvents]:
    """Send up to 1,000 events, all or none, in their order; those without an id get one here.

    So a repeat after a broken connection is known by its ids, and starts nothing twice.
    """
    known = [{**event, "id": event.get("id") or new_key()} for event in events]
    call = post(path_of(_ROOT, "batch"), InboundEvents, {"events": known})
    return replace(call, is_same_twice=True)


def list_events(
    *,
    name: str | None = None,
    limit: int | None = None,
    after: str | None = None,
    before: str | None = None,
) -> Call[Page[InboundEvent]]:
    """Events as they were received, newest first, with all runs that they started."""
    return get(
        path_of(_ROOT), Page[InboundEvent], name=name, limit=limit, after=after, before=before
    )
