"""`millpond queues`: how full the waiting lines are.

Called by `main`. Invariant: it only reads.
"""

from __future__ import annotations

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Token, Url
from millpond.cli.output import print_json, print_table


def queues(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List the queues: what waits, what runs, how old the oldest is."""
    page = call(url, token, lambda remote: remote.get("/v1/queues"))
    if as_json:
        print_json(page)
        return
    keys = ["name", "queued", "oldest_s", "running", "slots", "workers"]
    keys += ["scheduled", "waiting", "awaiting_input"]
    rows = [
        [_age(queue[key]) if key == "oldest_s" else queue[key] for key in keys]
        for queue in page["data"]
    ]
    columns = ["queue", "queued", "oldest", *(key.replace("_", " ") for key in keys[3:])]
    print_table(columns, rows, empty="No queues: nothing waits and no worker is known.")


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"
