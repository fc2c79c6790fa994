"""`millpond queues`, `workers`: how full the waiting lines are, and who works.

Called by `main`. Invariant: both only read.
"""

from __future__ import annotations

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import print_json, print_table
from millpond.types import Json


def queues(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List the queues: what waits, what runs, how old the oldest is."""
    page = call(url, token, lambda remote: remote.get("/v1/queues"))
    if as_json:
        print_json(page)
        return
    keys = ["running", "slots", "workers"]
    rest = ["scheduled", "waiting", "awaiting_input"]
    rows = [
        [
            queue["name"],
            _count(queue["queued"], is_exact=queue["is_depth_exact"]),
            _age(queue["oldest_s"]),
            *(queue[key] for key in keys),
            *(_count(queue[key], is_exact=queue["is_rest_exact"]) for key in rest),
            paused(queue["pauses"]),
        ]
        for queue in page["data"]
    ]
    columns = ["queue", "queued", "oldest", *(key.replace("_", " ") for key in [*keys, *rest])]
    columns.append("paused")
    print_table(columns, rows, empty="No queues: nothing waits and no worker is known.")


def workers(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List the live workers: where they are, what they serve, how busy they are."""
    page = call(url, token, lambda remote: remote.get("/v1/workers"))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["id"],
            one["host"],
            one["pid"],
            one["release"],
            _slots(one["queues"], one["in_use"]),
            _labels(one["labels"]),
            f"{one['heartbeat_age_s']:.1f} s",
            "draining" if one["is_draining"] else "",
        ]
        for one in page["data"]
    ]
    columns = ["worker", "host", "process", "release", "in use", "labels", "heartbeat", ""]
    empty = "No worker is live (`millpond worker`)."
    print_table(columns, rows, empty=empty, whole=("worker", "in use"))


def _slots(queues: Json, in_use: Json) -> str:
    return "\n".join(
        f"{name} {in_use.get(name, 0)}/{slots}" if slots else f"{name} helped"
        for name, slots in queues.items()
    )


def _labels(labels: Json) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def _count(number: int, *, is_exact: bool) -> str:
    return f"{number}" if is_exact else f"{number}+"


def paused(pauses: Json) -> str:
    """Return the scopes of pauses, in words."""
    return ", ".join(one["scope"] for one in pauses)


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"
