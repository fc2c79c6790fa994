"""`millpond doctor`: looks at everything that Millpond needs, and says what to do where it fails.

Called by `main`. Invariants: it changes nothing; one failing check does not stop the others; it ends
with 0 only if nothing failed (a warning is no failure).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from millpond.cli.exit import ExitCode
from millpond.cli.options import AsJson, DataDir, Flows
from millpond.cli.output import out, plain, print_json, print_table

if TYPE_CHECKING:
    from millpond.cli.checks import Check

_SIGNS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


def doctor(data_dir: DataDir = None, flows: Flows = None, as_json: AsJson = False) -> None:
    """Check Python, disk, models, flows, database, roles, schema, clock and workers."""
    from millpond.cli.checks import examine
    from millpond.cli.config import read_settings

    checks = asyncio.run(examine(read_settings(data_dir=data_dir, flows=flows)))
    if as_json:
        print_json({"object": "list", "data": [check.as_json() for check in checks]})
    else:
        _print(checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(ExitCode.FAILED)


def _print(checks: list[Check]) -> None:
    rows = [[check.name, _SIGNS[check.state], check.found] for check in checks]
    print_table(["check", "state", "found"], rows, empty="")
    for check in checks:
        if check.state != "ok" and check.advice:
            out().print(plain(f"{check.name}: {check.advice}"), soft_wrap=True)
