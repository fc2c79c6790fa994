"""Limits of the platform as settings and flows' code have them: read, and declared as a process starts.

Called by `serve` (settings), `work` (code) and `platform`, which reads them before it starts anything. Invariants: a
wrong entry is named with its setting before anything is stored; every change is audited in its transaction.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import structlog

from millpond.cli.replayed import read_set
from millpond.db.pool import Database
from millpond.engine.ceilings import MAX_LIMITS, check_rule
from millpond.engine.declaring import SETTINGS, Declaring, Wish, declare, wishes_of
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow
from millpond.engine.rules import Rule
from millpond.errors import InvalidInput
from millpond.identity import audit
from millpond.settings import Settings
from millpond.types import NO_ORG, Json, Principal

_log = structlog.get_logger("millpond.limits")
_PARAM, _FILE_PARAM = "MILLPOND_LIMITS", "MILLPOND_LIMITS_FILE"
_EXPECTED = (
    "write 'provider:openai concurrency=10', 'provider:openai rate=600/60 burst=10', or "
    "'provider:openai tokens=90000/60'"
)


def read_limits(settings: Settings) -> list[Rule] | None:
    """Return the limits that the settings have, None where they say nothing about limits.

    Raises InvalidInput naming the setting and the entry that is wrong.
    """
    if settings.limits is None and settings.limits_file is None:
        return None
    texts = [(_PARAM, settings.limits or "")]
    if settings.limits_file is not None:
        texts.append((_FILE_PARAM, _read(settings.limits_file)))
    found: dict[tuple[str, str], Rule] = {}
    for param, text in texts:
        for entry in _entries(text):
            rule = _rule(entry, param)
            if found.setdefault((rule.key, rule.kind), rule) is not rule:
                raise InvalidInput(
                    f"{entry!r}: a {rule.kind} limit on {rule.key} is there already", param=param
                )
    if len(found) > MAX_LIMITS:
        raise InvalidInput(f"{len(found)} limits, and {MAX_LIMITS} are the most", param=_PARAM)
    return list(found.values())


async def declare_settings(db: Database, hints: Hints, limits: Sequence[Rule] | None) -> None:
    """Let the limits of this host's settings be those of the platform's settings; None changes nothing."""
    if limits is not None:
        subject = f"settings:{socket.gethostname()}"
        wish = Wish(origin=SETTINGS, subject=subject, rules=limits)
        await _declare(db, hints, "settings", [wish])


async def declare_code(db: Database, hints: Hints, flows: Iterable[Flow]) -> None:
    """Let the limits that these flows declare be those of the code; raises InvalidInput for what does not fit."""
    await _declare(db, hints, "code", wishes_of(flows))


async def _declare(db: Database, hints: Hints, source: Declaring, wishes: Sequence[Wish]) -> None:
    async with db.globals() as con:
        changes = await declare(con, source, wishes)
        for change in changes:
            rule = change.rule
            details: dict[str, Json] = {"source": source, "overridden_by": change.overridden_by}
            if not change.is_gone:
                details |= {
                    "maximum": rule.maximum,
                    "period_s": rule.period_s,
                    "burst": rule.burst,
                }
            await audit.record(
                con,
                Principal(org_id=NO_ORG, subject=change.subject),
                "limit.removed" if change.is_gone else "limit.set",
                f"limit:{rule.kind} {rule.key}",
                details=details,
            )
    if changes:
        _log.info("limits.declared", source=source, changes=len(changes))
        hints.wake(["*"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", param=_FILE_PARAM) from error


def _entries(text: str) -> Iterator[str]:
    """Yield what stands between new lines and semicolons; lines that begin with # are comments."""
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            yield from (entry.strip() for entry in line.split(";") if entry.strip())


def _rule(entry: str, param: str) -> Rule:
    try:
        return check_rule(read_set(entry, NO_ORG))
    except InvalidInput as error:
        why = error.message if repr(entry) in error.message else f"{entry!r}: {error.message}"
        raise InvalidInput(why, param=param, advice=error.advice or _EXPECTED) from error
