"""Every commit point of the engine has a name of its own and a crash scenario."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.crash.points import ENGINE, names, sites
from tests.crash.test_crashes import EXEMPT, SCENARIOS

# Rooms with a connection of their own, and why their commits need no scenario.
OWN_CONNECTIONS = {
    "heartbeat.py": "one renewal, which may be repeated or missed; test_plugs.py ends the process",
    "hints.py": "hints carry no truth; test_plugs.py ends the listening connection",
}

# Rooms of the engine that open transactions of the application, and why those need no scenario of their own.
AS_APPLICATION = {
    "events.py": "reads only; what callers write is crashed in test_callers.py",
    "feeds.py": "reads only",
    "bulk.py": "inside a step, one whole act each, which a repeat of the step finds done",
    "reserving.py": "of the API: a killed process's blocks come back; tests/engine/test_quotas.py",
}


def test_every_transaction_of_the_engine_has_a_readable_name() -> None:
    unnamed = [site for site in sites() if not site.names]
    assert not unnamed, "give duty() and statement() a literal name: crash tests are made of it"


def test_every_transaction_of_the_engine_has_a_name_of_its_own() -> None:
    counts = Counter(name for site in sites() for name in site.names)
    shared = [name for name, count in counts.items() if count > 1]
    assert not shared, f"tell these apart, so that each is crashed by itself: {shared}"


def test_every_commit_point_is_crashed_before_and_after() -> None:
    crashed = {scenario.partition("#")[0] for scenario in SCENARIOS}
    wanted = set(names()) - set(EXEMPT)
    assert crashed == {f"{when}:{name}" for name in wanted for when in ("before", "after")}
    assert set(EXEMPT) <= set(names())
    assert {"claim", "record", "finish", "commit", "end", "park", "rescue"} <= set(names())


def test_a_name_that_is_computed_is_not_readable(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        "async def f(db, name, one):\n"
        "    async with db.duty(name): ...\n"
        "    async with db.statement('a' if one else 'b'): ...\n"
    )
    assert [site.names for site in sites(tmp_path)] == [(), ("a", "b")]


def test_no_other_room_of_the_engine_opens_connections_or_transactions() -> None:
    connecting, as_application = set(), set()
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func) in ("asyncpg.connect", "asyncpg.create_pool"):
                connecting.add(path.name)
            elif node.func.attr in ("org", "globals"):
                as_application.add(path.name)
    assert connecting == set(OWN_CONNECTIONS)
    assert as_application == set(AS_APPLICATION)
