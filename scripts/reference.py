"""Writes the parts of docs/ that follow from the code: settings, commands, exit codes, routes.

Called by `make reference`, and with `--check` by the tests. Invariant: only what stands between the
markers `<!-- begin NAME -->` and `<!-- end NAME -->` of a page is replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def settings_table() -> str:
    """Render every setting: its variable, its default, what it does."""
    from pydantic_core import PydanticUndefined

    from millpond.settings import Settings

    lines = ["| variable | default | what it does |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if name == "data_dir":
            shown = "the user's data folder; as root `/var/lib/millpond`"
        elif default is None or default is PydanticUndefined or default == "":
            shown = "unset"
        else:
            shown = f"`{default}`"
        lines.append(f"| `MILLPOND_{name.upper()}` | {shown} | {_cell(field.description or '')} |")
    return "\n".join(lines)


def commands() -> str:
    """Render every command with its arguments and options."""
    import typer.main

    from millpond.cli.main import app

    root = typer.main.get_command(app)
    return "\n\n".join(_commands(root, "millpond"))


def _commands(command: Any, path: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        if command.invoke_without_command:
            yield from _command(command, path)
        for name in command.commands:
            if not command.commands[name].hidden:
                yield from _commands(command.commands[name], f"{path} {name}")
        return
    yield from _command(command, path)


def _command(command: Any, path: str) -> Iterator[str]:
    words = [_argument(item) for item in command.params if item.param_type_name == "argument"]
    yield f"### `{' '.join([path, *words])}`"
    yield _prose(command.help)
    shown = [item for item in command.params if item.param_type_name == "option"]
    rows = [_option(item) for item in shown if not item.hidden]
    if rows:
        yield "\n".join(["| option | what it does |", "|---|---|", *rows])


def _argument(item: Any) -> str:
    name = (item.metavar or item.name).upper() + ("..." if item.nargs == -1 else "")
    return name if item.required else f"[{name}]"


def _option(item: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])
    notes = []
    if item.required:
        notes.append("Required.")
    elif item.show_default and item.default not in (None, False, "", [], ()):
        notes.append(f"Default: `{item.default}`.")
    if item.envvar:
        notes.append(f"Or `{item.envvar}`.")
    return f"| {names} | {_cell(' '.join([item.help or '', *notes]).strip())} |"


def exit_codes() -> str:
    """Render what each exit code means."""
    from millpond.cli.exit import MEANINGS

    rows = [f"| {int(code)} | {_cell(meaning)} |" for code, meaning in MEANINGS.items()]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])


def routes() -> str:
    """Render every route with the permission that it needs and the statuses it answers."""
    from millpond.api.app import create_app

    none: Any = None
    some: Any = object()
    app = create_app(
        db=none,
        gate=none,
        hints=none,
        feed=none,
        people=none,
        auditor=none,
        outside=none,
        knowledge=some,
    )
    needed = dict(_permissions(app.routes))
    lines = ["| route | what it does | permission | answers |", "|---|---|---|---|"]
    for path, methods in app.openapi()["paths"].items():
        for method, route in methods.items():
            what = _cell(route.get("description", route["summary"]).partition("\n\n")[0])
            codes = ", ".join(sorted(route["responses"]))
            needs = needed[route["operationId"]] or "none: public"
            lines.append(f"| `{method.upper()} {path}` | {what} | {needs} | {codes} |")
    return "\n".join(lines)


def _permissions(routes: Any) -> Iterator[tuple[str, str | None]]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from _permissions(inner.routes)
        elif hasattr(route, "dependant"):
            yield route.operation_id, _permission(route.dependant)


def _permission(dependant: Any) -> str | None:
    for inner in dependant.dependencies:
        found = getattr(inner.call, "permission", None) or _permission(inner)
        if found:
            return f"`{found.strip('`')}`"
    return None


def _prose(text: str | None) -> str:
    return " ".join((text or "").split("\f")[0].split())


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("settings.md", settings_table),
    "commands": ("cli.md", commands),
    "exit codes": ("cli.md", exit_codes),
    "routes": ("http.md", routes),
}


def replaced(text: str, name: str, body: str) -> str:
    """Return a page with the part `name` replaced; raises ValueError when it has no such part."""
    pattern = re.compile(
        rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL
    )
    if not pattern.search(text):
        raise ValueError(f"the markers of part {name!r} are missing")
    return pattern.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", text, count=1)


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` tell which are out of date; returns the exit code."""
    stale = []
    for name, (page, render) in PARTS.items():
        path = DOCS / page
        before = path.read_text(encoding="utf-8")
        after = replaced(before, name, render())
        if after != before:
            stale.append(f"docs/{page}: {name}")
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.stderr.write("Out of date, run `make reference`:\n" + "\n".join(stale) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
