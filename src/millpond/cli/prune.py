"""`millpond prune`: deletes old finished runs by hand; and for how long workers keep them.

Called by `main` and `work`. Invariant: it deletes by the same statements, in the same small batches and
under the same lock as the workers do by themselves.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.options import AsJson, DataDir
from millpond.cli.output import out, plain, print_json, progress
from millpond.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.db.pool import EngineDatabase
    from millpond.engine.retention import Keep
    from millpond.settings import Settings

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_PAUSE_S = 0.05


def keep(settings: Settings) -> Keep:
    """Return for how long workers keep what is over."""
    from millpond.engine.retention import Keep

    return Keep(
        runs_s=settings.retention_days * _UNITS_S["d"] or None,
        keys_s=settings.idempotency_hours * _UNITS_S["h"],
        inbound_s=settings.inbound_event_days * _UNITS_S["d"],
    )


def read_duration_s(text: str, *, param: str) -> float:
    """Read `7d`, `12h`, `30m`; raises InvalidInput naming `param`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise InvalidInput(
            f"{text!r} is not a duration",
            param=param,
            advice="Give a number and a unit: 90s, 30m, 12h, 7d, 4w.",
        )
    return float(found[1]) * _UNITS_S[found[2]]


def prune(
    older_than: Annotated[
        str, typer.Option(help="Age of what goes: 12h, 7d, 4w.", show_default=False)
    ],
    org: Annotated[str | None, typer.Option(help="Only of the org with this slug.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete runs that were over before a time, with their steps, events and values."""
    from millpond.cli.config import read_settings

    older_than_s = read_duration_s(older_than, param="--older-than")
    settings = read_settings(data_dir=data_dir)
    counts = asyncio.run(_prune(settings, older_than_s, org, dry_run=dry_run))
    runs = sum(counts.values())
    if as_json:
        document = {"object": "pruning", "runs": runs, "orgs": counts, "dry_run": dry_run}
        print_json(document)
        return
    for slug, count in counts.items():
        out().print(plain(f"{slug}: {count} runs"))
    out().print(plain(f"{runs} runs would be deleted" if dry_run else f"{runs} runs deleted"))


async def _prune(
    settings: Settings, older_than_s: float, slug: str | None, *, dry_run: bool
) -> dict[str, int]:
    """Return how many runs went, by the slug of their org; orgs without any are left out."""
    from millpond.cli.running import find_databases
    from millpond.db.migrate import check_schema
    from millpond.db.pool import EngineDatabase

    engine_url = find_databases(settings).need_engine()
    await check_schema(engine_url)
    database = await EngineDatabase.connect(engine_url, name="millpond-prune", min_size=1)
    try:
        counts: dict[str, int] = {}
        for name, org_id in await _orgs(database, slug):
            count = await _prune_org(database, org_id, older_than_s, dry_run=dry_run)
            if count:
                counts[name] = count
                progress(f"{name}: {count} runs")
        return counts
    finally:
        await database.close()


async def _orgs(database: EngineDatabase, slug: str | None) -> list[tuple[str, int]]:
    from millpond.db.queries import queries
    from millpond.errors import NotFound

    async with database.statement("prune_preview") as con:
        rows = await con.fetch(queries("retention")["orgs"], slug)
    if slug is not None and not rows:
        raise NotFound(f"there is no org {slug!r}", param="--org")
    return [(row["slug"], row["org_id"]) for row in rows]


async def _prune_org(
    database: EngineDatabase, org_id: int, older_than_s: float, *, dry_run: bool
) -> int:
    """Walk an org's runs once, oldest first; keys of that age go before them."""
    from millpond.engine import retention

    while not dry_run:
        async with database.duty("prune_keys") as con:
            before_s = await retention.lock(con) - older_than_s
            if await retention.prune_keys(con, before_s=before_s, org_id=org_id) == 0:
                break
    count, cursor, has_more = 0, retention.FIRST, True
    while has_more:
        async with database.duty("prune_runs") as con:
            page = await retention.prune_page(
                con,
                org_id,
                cursor,
                now_s=await retention.lock(con),
                older_than_s=older_than_s,
                dry_run=dry_run,
            )
        count, cursor, has_more = count + page.runs, page.cursor, page.has_more
        await asyncio.sleep(_PAUSE_S)
    return count
