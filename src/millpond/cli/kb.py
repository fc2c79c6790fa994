"""`millpond kb`: put documents into a knowledge base, list them, search them.

Called by `main`. Invariant: a file is sent as its bytes with its name; what is made of it is the
server's business.
"""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from millpond.cli import timeline
from millpond.cli.call import call
from millpond.cli.exit import ExitCode
from millpond.cli.options import DEFAULT_URL, AsJson, Limit, Token, Url
from millpond.cli.output import out, plain, print_json, print_table, progress
from millpond.errors import InvalidInput
from millpond.types import Json

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

app = typer.Typer(no_args_is_help=True, help="Add documents to knowledge bases and search them.")

Base = Annotated[str, typer.Argument(help="Name of the knowledge base.", show_default=False)]
SUFFIXES = frozenset({".md", ".markdown", ".txt", ".html", ".htm", ".pdf"})


@app.command()
def add(
    base: Base,
    paths: Annotated[list[Path], typer.Argument(help="Files or folders.", show_default=False)],
    wait: Annotated[bool, typer.Option(help="Wait until they can be searched.")] = True,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Ingest files, and the documents in folders, into the knowledge base BASE."""
    files = collect(paths)

    async def talk(remote: Remote) -> list[Json]:
        accepted = [await upload(remote, base, name, path) for name, path in files]
        if not wait:
            return accepted
        return [await _await_run(remote, answer) for answer in accepted]

    runs = call(url, token, talk)
    if as_json:
        print_json({"object": "list", "data": runs})
    else:
        rows = [[name, run["id"], run["state"]] for (name, _), run in zip(files, runs, strict=True)]
        print_table(["file", "run", "state"], rows, empty="No files.")
    if any(run["state"] in ("failed", "cancelled") for run in runs):
        raise typer.Exit(ExitCode.FAILED)


@app.command("list")
def list_documents(
    base: Base, as_json: AsJson = False, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """List the documents of the knowledge base BASE."""
    page = call(url, token, lambda remote: remote.get(f"/v1/knowledge-bases/{base}/documents"))
    if as_json:
        print_json(page)
        return
    keys = ["filename", "state", "stage", "chunks", "reason", "id"]
    columns = ["document", *keys[1:]]
    rows = [[document.get(key) for key in keys] for document in page["data"]]
    print_table(columns, rows, empty="No documents.")


@app.command()
def search(
    base: Base,
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    limit: Limit = 5,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Search the knowledge base BASE; each passage comes with its source."""
    body = {"query": query, "limit": limit}
    path = f"/v1/knowledge-bases/{base}/search"
    found = call(url, token, lambda remote: remote.post(path, body))
    if as_json:
        print_json(found)
        return
    passages = found["data"]
    if not passages:
        out().print("Nothing found.")
    for passage in passages:
        out().print(Text(plain(f"{passage['score']:.3f}  {passage['filename']}"), style="bold"))
        out().print(Text(plain(passage["text"])))


def collect(paths: list[Path]) -> list[tuple[str, Path]]:
    """Return (name, path) of every document at `paths`; folders are walked, hidden files left out.

    Raises InvalidInput for a path that does not exist or a folder without documents.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_file():
            found.append((path.name, path))
            continue
        if not path.is_dir():
            raise InvalidInput(f"{path} does not exist", param="PATHS")
        inside = [file for file in sorted(path.rglob("*")) if _is_document(file, path)]
        if not inside:
            raise InvalidInput(
                f"{path} holds no documents ({', '.join(sorted(SUFFIXES))})", param="PATHS"
            )
        found.extend((file.relative_to(path).as_posix(), file) for file in inside)
    return found


async def upload(remote: Remote, base: str, name: str, path: Path) -> Json:
    """Send one file; returns what the server accepted: the run that ingests it."""
    progress(f"sending {name}")
    return await remote.post(
        f"/v1/knowledge-bases/{base}/documents",
        content=path.read_bytes(),
        params={"filename": name},
        headers={"Content-Type": "application/octet-stream"},
    )


async def _await_run(remote: Remote, accepted: Json) -> Json:
    async with aclosing(remote.follow(accepted["id"])) as events:
        async for event in events:
            progress(timeline.event_line(event).plain)
    return await remote.get(f"/v1/runs/{accepted['id']}")


def _is_document(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and file.suffix.lower() in SUFFIXES
