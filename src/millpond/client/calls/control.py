"""Calls about what works: flows, queues, workers, and pauses of them."""

from __future__ import annotations

from millpond.client.call import Call, get, path_of, post
from millpond.client.models import Page
from millpond.client.models_control import Flow, Pause, Queue, Resumed, Worker


def list_flows() -> Call[Page[Flow]]:
    """All flows by name."""
    return get(path_of("flows"), Page[Flow])


def get_flow(name: str) -> Call[Flow]:
    """Return one flow with the schema of its input."""
    return get(path_of("flows", name), Flow)


def pause_flow(name: str, reason: str = "") -> Call[Pause]:
    """Claim no more runs of a flow, in whatever queue and version; what runs goes on."""
    return post(path_of("flows", name, "pause"), Pause, {"reason": reason})


def resume_flow(name: str) -> Call[Resumed]:
    """Let the runs of a paused flow go on."""
    return post(path_of("flows", name, "resume"), Resumed)


def list_queues() -> Call[Page[Queue]]:
    """Queues by name, with the org's own work in each."""
    return get(path_of("queues"), Page[Queue])


def pause_queue(name: str, reason: str = "", *, everyone: bool = False) -> Call[Pause]:
    """Claim nothing more of the org's from a queue; with `everyone`, an operator's, of no org."""
    body = {"reason": reason, "everyone": everyone}
    return post(path_of("queues", name, "pause"), Pause, body)


def resume_queue(name: str, *, everyone: bool = False) -> Call[Resumed]:
    """Let a paused queue go on; `everyone` as when it was paused."""
    return post(path_of("queues", name, "resume"), Resumed, {"everyone": everyone})


def pause_org(reason: str = "") -> Call[Pause]:
    """Claim no more work of the org; what runs goes on."""
    return post(path_of("org", "pause"), Pause, {"reason": reason})


def resume_org() -> Call[Resumed]:
    """Let the work of a paused org go on; pauses of its queues and flows stay."""
    return post(path_of("org", "resume"), Resumed)


def list_pauses() -> Call[Page[Pause]]:
    """What is paused: by the org, and queues by the operator for everyone."""
    return get(path_of("pauses"), Page[Pause])


def list_workers() -> Call[Page[Worker]]:
    """Live worker processes, oldest first."""
    return get(path_of("workers"), Page[Worker])
