"""`millpond inputs`: what awaits a human, and the answer to it.

Called by `main`. Invariant: an answer carries the digest of what was shown, so that nobody approves
something else than they saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.call import call
from millpond.cli.options import DEFAULT_URL, AsJson, Limit, Token, Url, read_json
from millpond.cli.output import out, plain, print_fields, print_json, print_table
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

app = typer.Typer(no_args_is_help=True, help="See and answer what awaits a human.")


@app.command("list")
def list_inputs(
    state: Annotated[
        str, typer.Option(help="pending, resolved, expired or cancelled.")
    ] = "pending",
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List input requests."""
    params = {"state": state, "limit": limit, "after": after}
    page = call(url, token, lambda remote: remote.get("/v1/input-requests", params))
    if as_json:
        print_json(page)
        return
    rows = [
        [item["id"], item["role"], item["title"], item["run_id"], item["expires_at"]]
        for item in page["data"]
    ]
    print_table(["request", "role", "title", "run", "until"], rows, empty="Nothing awaits a human.")


@app.command()
def show(
    request_id: Annotated[str, typer.Argument(help="Id of the input request.")],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Show one input request: its form and what is to be approved."""
    item = call(url, token, lambda remote: remote.get(f"/v1/input-requests/{request_id}"))
    if as_json:
        print_json(item)
    else:
        print_fields((name, value) for name, value in item.items() if name != "object")


@app.command()
def resolve(
    request_id: Annotated[str, typer.Argument(help="Id of the input request.", show_default=False)],
    answer: Annotated[
        str, typer.Option("--answer", "-a", help="Answer: JSON text, @file, or - for stdin.")
    ],
    digest: Annotated[
        str | None, typer.Option(help="Digest of what was seen. Unset: of what is asked now.")
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Answer an input request; the run goes on."""
    given = read_json(answer, param="--answer")

    async def talk(remote: Remote) -> Json:
        path = f"/v1/input-requests/{request_id}"
        seen = digest or (await remote.get(path))["digest"]
        return await remote.post(f"{path}/resolve", {"answer": given, "digest": seen})

    resolved = call(url, token, talk)
    if as_json:
        print_json(resolved)
    else:
        out().print(plain(f"request {request_id} resolved; run {resolved['run_id']} goes on"))
