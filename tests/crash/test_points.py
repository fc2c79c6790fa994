"""Every commit point of the engine has a name of its own and a crash scenario."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from tests.crash.points import ENGINE, names, sites
from tests.crash.test_crashes import SCENARIOS

# Rooms with a connection of their own, and why their commits need no scenario.
OWN_CONNECTIONS = {
    "heartbeat.py": "one idempotent renewal; test_faults.py ends the process and its connection",
    "hints.py": "hints carry no truth; test_faults.py ends the listening connection",
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
    assert crashed == {f"{when}:{name}" for name in names() for when in ("before", "after")}
    assert {"claim", "record", "finish", "commit", "end", "park", "rescue"} <= set(names())


def test_a_name_that_is_computed_is_not_readable(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        "async def f(db, name, one):\n"
        "    async with db.duty(name): ...\n"
        "    async with db.statement('a' if one else 'b'): ...\n"
    )
    assert [site.names for site in sites(tmp_path)] == [(), ("a", "b")]


def test_no_other_room_of_the_engine_opens_connections() -> None:
    found = set()
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_opened = isinstance(node, ast.Attribute) and node.attr in ("connect", "create_pool")
            if is_opened and ast.unparse(node.value) == "asyncpg":
                found.add(path.name)
    assert found == set(OWN_CONNECTIONS)
