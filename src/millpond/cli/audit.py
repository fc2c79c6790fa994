"""`millpond audit`: read the audit log, export it, verify that nobody changed it.

Called by `main`. Invariant: verifying asks the database and the key, and trusts no server.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from millpond.cli.call import call
from millpond.cli.exit import ExitCode
from millpond.cli.options import DEFAULT_URL, AsJson, DataDir, Token, Url
from millpond.cli.output import err, out, plain, print_json, print_table
from millpond.errors import InvalidInput, MillpondError, NotFound
from millpond.types import NO_ORG

if TYPE_CHECKING:
    from millpond.cli.remote import Remote
    from millpond.identity.audit_check import Report
    from millpond.identity.ring import KeyRing
    from millpond.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Read, export and verify the audit log.")

_ROWS = 10_000


@app.command(name="list")
def list_audit(
    subject: Annotated[str | None, typer.Option(help="Only what they did: user:….")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only actions that begin so, such as member..")
    ] = None,
    resource: Annotated[str | None, typer.Option(help="Only to this: kind:id.")] = None,
    run: Annotated[str | None, typer.Option(help="Only in or to this run.")] = None,
    since: Annotated[str | None, typer.Option(help="Only from this time on (RFC 3339).")] = None,
    until: Annotated[str | None, typer.Option(help="Only before this time.")] = None,
    platform: Annotated[
        bool, typer.Option("--platform", help="The platform's own log; for operators.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=200)] = 50,
    after: Annotated[str | None, typer.Option(help="Go on after this id (`last_id`).")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """List what was done, newest first."""
    params = {
        "subject": subject,
        "action": action,
        "resource": resource,
        "run_id": run,
        "since": since,
        "until": until,
        "limit": limit,
        "after": after,
    }
    path = "/v1/platform/audit" if platform else "/v1/audit"
    page = call(url, token, lambda remote: remote.get(path, params))
    if as_json:
        print_json(page)
        return
    rows = [
        [
            one["at"],
            one["subject"],
            one["action"],
            one["resource"],
            one["granted_by"],
            one["seal"]["seq"] if one["seal"] else None,
        ]
        for one in page["data"]
    ]
    columns = ["at", "who", "what", "to", "let in by", "seal"]
    print_table(columns, rows, empty="Nothing was done.")


@app.command()
def export(
    to: Annotated[
        Path | None, typer.Option("--to", help="File to write; unset: stdout.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="ndjson, which verifies, or csv.")] = "ndjson",
    after: Annotated[int, typer.Option(help="Go on after this place of the chain.", min=0)] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Write the log with its seals, in the order of its chain."""
    if format not in ("ndjson", "csv"):
        raise InvalidInput(f"{format!r} is neither ndjson nor csv", param="--format")

    async def talk(remote: Remote) -> None:
        parts = remote.download("/v1/audit/export", {"format": format, "after": after})
        with ExitStack() as stack:
            file: BinaryIO = sys.stdout.buffer if to is None else stack.enter_context(to.open("wb"))
            await _write(parts, file)

    call(url, token, talk)


async def _write(parts: AsyncIterator[bytes], file: BinaryIO) -> None:
    async for part in parts:
        file.write(part)
    file.flush()


@app.command()
def verify(
    org: Annotated[
        str | None, typer.Option(help="Only the org with this slug. Unset: all, and the platform.")
    ] = None,
    platform: Annotated[
        bool, typer.Option("--platform", help="Only the platform's own log.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="An export (NDJSON) in place of the database."),
    ] = None,
    allow_no_heads: Annotated[
        bool,
        typer.Option(
            "--allow-no-heads",
            help="End with 0 also where no published head is at hand, as for a file.",
        ),
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Compute every seal again, and hold the log against what was published.

    Exits with 1 when anything is found, with 8 when nothing is but a log has no published head: its end may be cut off,
    or all of it. Only the empty log of an org that is younger than an hour needs none.
    """
    from millpond.cli.config import read_settings

    settings = read_settings(data_dir=data_dir)
    if file is not None:
        reports = {str(file): _verify_file(settings, file)}
    else:
        reports = asyncio.run(_verify(settings, org, only_platform=platform))
    if as_json:
        print_json({"object": "list", "data": [_json(name, one) for name, one in reports.items()]})
    else:
        _print(reports)
    if not all(report.is_intact for report in reports.values()):
        raise typer.Exit(ExitCode.FAILED)
    if not allow_no_heads and any(report.is_unproven for report in reports.values()):
        raise typer.Exit(ExitCode.UNPROVEN)


def _verify_file(settings: Settings, path: Path) -> Report:
    from millpond.cli.key_ring import read_ring
    from millpond.identity.audit_check import verify_lines

    ring = read_ring(settings)
    asyncio.run(_learn(ring, settings))
    try:
        with path.open("rb") as lines:
            return verify_lines(ring, lines)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", param="--file") from error


async def _learn(ring: KeyRing, settings: Settings) -> None:
    """Learn of keys that were given up, which the database keeps; says so where it is out of reach."""
    from millpond.cli.running import find_databases
    from millpond.db.pool import Database

    try:
        db = await Database.connect(find_databases(settings).app, name="millpond-audit", max_size=1)
    except MillpondError:
        err().print(
            "the database is out of reach: keys that were given up are not known", style="dim"
        )
        return
    try:
        await ring.keep(db)
    finally:
        await db.close()


async def _verify(
    settings: Settings, slug: str | None, *, only_platform: bool
) -> dict[str, Report]:
    """Return what was found, by the slugs of orgs; the platform is `(platform)`."""
    from millpond.cli.config import audit_heads_dir
    from millpond.cli.key_ring import open_ring
    from millpond.cli.running import find_databases
    from millpond.db.migrate import check_schema
    from millpond.db.pool import Database
    from millpond.identity.audit_check import Auditor
    from millpond.identity.audit_heads import Heads
    from millpond.identity.audit_sealer import opened, orgs

    url = find_databases(settings).app
    await check_schema(url)
    db = await Database.connect(url, name="millpond-audit", max_size=1)
    reports: dict[str, Report] = {}
    try:
        auditor = Auditor(await open_ring(settings, db), Heads(audit_heads_dir(settings)))
        logs = [] if slug is not None else [("(platform)", NO_ORG)]
        if not only_platform:
            logs += [(name, org_id) async for org_id, name in orgs(db) if slug in (None, name)]
        if not logs:
            raise NotFound(f"there is no org {slug!r}", param="--org")
        for name, org_id in logs:
            reports[name] = await auditor.verify(partial(opened, db, org_id), org_id)
    finally:
        await db.close()
    return reports


def _print(reports: dict[str, Report]) -> None:
    rows = [
        [
            name,
            report.sealed,
            report.published_seq,
            report.unsealed,
            None if report.oldest_unsealed_s is None else f"{report.oldest_unsealed_s:.0f} s",
            "intact" if report.is_intact else f"{report.fault_count} faults",
        ]
        for name, report in reports.items()
    ]
    columns = ["log", "seals", "published", "unsealed", "oldest", "found"]
    print_table(columns, rows, empty="There are no logs.")
    for name, report in reports.items():
        if report.is_unproven:
            out().print(plain(f"{name}: no published head was at hand: a cut end would not show"))
        for fault in report.faults:
            where = [f"seal {fault.seq}"] if fault.seq is not None else []
            where += [f"row {fault.audit_id}"] if fault.audit_id is not None else []
            out().print(plain(f"{name}: {fault.kind} at {', '.join(where)}: {fault.text}"))
        if report.fault_count > len(report.faults):
            out().print(plain(f"{name}: and {report.fault_count - len(report.faults)} more"))


def _json(name: str, report: Report) -> dict[str, Any]:
    return {
        "object": "audit_verification",
        "log": name,
        "is_intact": report.is_intact,
        "sealed": report.sealed,
        "last_seq": report.last_seq,
        "published_seq": report.published_seq,
        "unsealed": report.unsealed,
        "oldest_unsealed_s": report.oldest_unsealed_s,
        "fault_count": report.fault_count,
        "faults": [
            {
                "kind": fault.kind,
                "text": fault.text,
                "seq": fault.seq,
                "audit_id": None if fault.audit_id is None else str(fault.audit_id),
            }
            for fault in report.faults
        ],
    }
