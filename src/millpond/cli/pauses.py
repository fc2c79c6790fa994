"""`millpond pause`, `millpond resume`, `millpond pauses`: hold work and let it go.

Called by `main`. Invariant: what is paused is said to stand queued, never to be lost.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Bearer, Token, Url
from millpond.cli.output import out, plain, print_json, print_table
from millpond.types import Json

pause = typer.Typer(no_args_is_help=True, help="Claim no more of a queue, a flow, or all work.")
resume = typer.Typer(no_args_is_help=True, help="Let paused work go on.")

Queue = Annotated[str, typer.Argument(metavar="QUEUE", help="Name of the queue.")]
Flow = Annotated[str, typer.Argument(metavar="FLOW", help="Name of the flow.")]
Reason = Annotated[str, typer.Option(help="Why, for whoever asks what waits.")]
Everyone = Annotated[
    bool, typer.Option("--everyone", help="For every org; needs the operator's permission.")
]


@pause.command("queue")
def pause_queue(
    name: Queue,
    reason: Reason = "",
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Pause a queue: what runs goes on, nothing more is claimed from it."""
    body = {"reason": reason, "everyone": everyone}
    _paused(_post(url, token, f"/v1/queues/{quote(name)}/pause", body), as_json=as_json)


@pause.command("flow")
def pause_flow(
    name: Flow,
    reason: Reason = "",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Pause a flow, in whatever queue and version."""
    _paused(
        _post(url, token, f"/v1/flows/{quote(name)}/pause", {"reason": reason}), as_json=as_json
    )


@pause.command("org")
def pause_org(
    reason: Reason = "", as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Pause all work of the org."""
    _paused(_post(url, token, "/v1/org/pause", {"reason": reason}), as_json=as_json)


@resume.command("queue")
def resume_queue(
    name: Queue,
    everyone: Everyone = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Resume a queue."""
    answer = _post(url, token, f"/v1/queues/{quote(name)}/resume", {"everyone": everyone})
    _resumed(answer, f"queue {name}", as_json=as_json)


@resume.command("flow")
def resume_flow(
    name: Flow, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Resume a flow."""
    _resumed(_post(url, token, f"/v1/flows/{quote(name)}/resume"), f"flow {name}", as_json=as_json)


@resume.command("org")
def resume_org(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Resume the work of the org; pauses of its queues and flows stay."""
    _resumed(_post(url, token, "/v1/org/resume"), "the org", as_json=as_json)


def pauses(as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List what is paused, by whom, since when and why."""
    page = call(url, token, lambda remote: remote.get("/v1/pauses"))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["scope"],
            one["queue"] or one["flow"],
            one["paused_by"],
            one["paused_at"],
            one["reason"],
        ]
        for one in page["data"]
    ]
    print_table(["what", "name", "by", "since", "why"], rows, empty="Nothing is paused.")


def _post(url: str, token: Bearer | None, path: str, body: Json = None) -> Json:
    return call(url, token, lambda remote: remote.post(path, body or {}))


def _paused(answer: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    out().print(plain(f"{answer['id']} is paused by {answer['paused_by']}; its work stands queued"))


def _resumed(answer: Json, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    out().print(plain(f"{what} goes on" if answer["was_paused"] else f"{what} was not paused"))
