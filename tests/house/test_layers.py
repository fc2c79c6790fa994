"""Imports point down: walks every module's syntax tree and checks its imports against the layers.

Counts imports under `TYPE_CHECKING`, inside functions and through `import_module("…")`. The checker
is itself held by small offending trees.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "millpond"

# From the top down; rooms in one set never import each other.
LEVELS: list[set[str]] = [
    {"cli", "__main__"},
    {"api", "console", "observability"},
    {"inbox", "analytics", "agents", "knowledge", "integrations"},
    {"identity", "models"},
    {"engine"},
    {"db"},
    {"errors", "types", "settings", "retry", "veil"},
]
KERNEL = LEVELS[-1]
# Speaks HTTP to a server and imports nothing of it.
APART = {"client"}
# Only the composition root reads the environment.
ONLY_BY_CLI = {"settings"}

# The engine's rooms from the top down: each may import those after it.
ENGINE = [
    "worker",
    "sessions",
    "equipping",
    "claiming",
    "watching",
    "upkeep",
    "agenda",
    "launching",
    "quarantine",
    "reserving",
    "bulk",
    "inputs",
    "step_executor",
    "step_tries",
    "step_attempt",
    "refusals",
    "executor",
    "endgame",
    "checking",
    "replaying",
    "attempt",
    "context",
    "continuing",
    "children",
    "fanning",
    "signals",
    "values",
    "checkpoints",
    "calling",
    "performing",
    "recording",
    "seating",
    "strays",
    "opening",
    "once",
    "scope",
    "family",
    "resting",
    "sharing",
    "plans",
    "deltas",
    "riding",
    "waking",
    "settling",
    "placing",
    "step_context",
    "branches",
    "chores",
    "reruns",
    "dedup",
    "operations",
    "blocking",
    "maintenance",
    "firing",
    "inbound",
    "starting",
    "schedules",
    "triggers",
    "poison",
    "retention",
    "deadlines",
    "submit",
    "commit",
    "storing",
    "endings",
    "remote",
    "timers",
    "questions",
    "waits",
    "parking",
    "answers",
    "history",
    "tolls",
    "slots",
    "charging",
    "batches",
    "features",
    "quota_plans",
    "quotas",
    "metering",
    "rights",
    "vault",
    "throttling",
    "failures",
    "sampling",
    "meters",
    "claim",
    "moved",
    "simulated",
    "simulating",
    "crew",
    "heads",
    "loads",
    "standing",
    "settled",
    "boarding",
    "limiting",
    "due_rooms",
    "crossings",
    "reservations",
    "rulebook",
    "waiters",
    "seats",
    "counting",
    "spilling",
    "urgencies",
    "turns",
    "accounts",
    "urgency",
    "keeping",
    "admission",
    "why",
    "why_queued",
    "ordering",
    "saturation_of_all",
    "saturation",
    "declaring",
    "ceilings",
    "fitting",
    "easing",
    "needs",
    "bounds",
    "queues",
    "recorded",
    "leases",
    "lanes",
    "charges",
    "fullness",
    "estimates",
    "targets",
    "gathering",
    "calendar",
    "pages",
    "views",
    "pauses",
    "feeds",
    "events",
    "growing",
    "hints",
    "nearby",
    "registry",
    "declared",
    "pacing",
    "rules",
    "keying",
    "manners",
    "tokens",
    "brakes",
    "arguments",
    "encoding",
    "payloads",
    "columns",
    "duties",
    "leasehold",
    "heartbeat",
]


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement of a module, by dotted names."""

    source: str
    target: str
    line: int


def modules(root: Path) -> dict[str, Path]:
    """Map the dotted name of every module under the package folder `root` to its file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


@functools.cache
def imports(root: Path) -> list[Import]:
    """Return every import between modules of the package, wherever in a file it stands."""
    known = modules(root)
    names, found = set(known), []
    for source, path in known.items():
        is_package = path.name == "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for node in ast.walk(tree):
            for name in _targets(node, source, is_package=is_package, known=names):
                if name == root.name or name.startswith(root.name + "."):
                    target = _nearest(name, names)
                    line = getattr(node, "lineno", 0)
                    found.append(Import(source=source, target=target, line=line))
    return found


def _targets(node: ast.AST, source: str, *, is_package: bool, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = source.split(".")
            keep = len(parts) - node.level + (1 if is_package else 0)
            base = ".".join([*parts[:keep], *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in known else base
    elif isinstance(node, ast.Call) and node.args:
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        first = node.args[0]
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
            yield str(first.value)


def _nearest(name: str, known: set[str]) -> str:
    """Cut `name` down to the module that it lies in."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _level(room: str) -> int | None:
    return next((n for n, rooms in enumerate(LEVELS) if room in rooms), None)


def violations(root: Path) -> list[str]:
    """Return one line per import that does not point down."""
    found = [
        f"{module}: the room {_room(module)!r} stands in no layer"
        for module in modules(root)
        if _room(module) and _room(module) not in APART and _level(_room(module)) is None
    ]
    for item in imports(root):
        reason = _wrong(item)
        if reason:
            found.append(f"{item.source}:{item.line} imports {item.target}: {reason}")
    return found


def _wrong(item: Import) -> str | None:
    source, target = _room(item.source), _room(item.target)
    if not source or not target:
        return None
    if source == target:
        return _wrong_in_engine(item) if source == "engine" else None
    if APART & {source, target}:
        return "the client and the server share no code"
    if target in ONLY_BY_CLI and source != "cli":
        return "only cli reads settings"
    upper, lower = _level(source), _level(target)
    if upper is None or lower is None or (source in KERNEL and target in KERNEL):
        return None
    if upper > lower:
        return f"{target} stands above {source}"
    if upper == lower:
        return "rooms of one level do not import each other"
    return None


def _wrong_in_engine(item: Import) -> str | None:
    source, target = (name.split(".")[2:3] for name in (item.source, item.target))
    if not source or not target or source == target:
        return None
    unknown = [name for name in (*source, *target) if name not in ENGINE]
    if unknown:
        return f"engine/{unknown[0]} has no place in the engine's order"
    if ENGINE.index(source[0]) > ENGINE.index(target[0]):
        return f"engine/{target[0]} stands above engine/{source[0]}"
    return None


def cycles(root: Path) -> list[list[str]]:
    """Return every group of modules that import each other in a circle (Tarjan, 1972)."""
    graph: dict[str, set[str]] = {module: set() for module in modules(root)}
    for item in imports(root):
        if item.target != item.source and not item.source.startswith(item.target + "."):
            graph[item.source].add(item.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_every_import_of_the_source_points_down():
    assert len(imports(SOURCE)) > 20
    assert violations(SOURCE) == []


def test_no_modules_of_the_source_import_each_other_in_a_circle():
    assert cycles(SOURCE) == []


def test_every_room_of_the_engine_has_its_place_in_the_order():
    rooms = {path.stem for path in (SOURCE / "engine").glob("*.py")} - {"__init__"}
    assert rooms - set(ENGINE) == set()


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes a small package `millpond` and gives its folder."""

    def write(**files: str) -> Path:
        root = tmp_path / "millpond"
        for dotted, text in {"__init__": "", **files}.items():
            path = root.joinpath(*dotted.split(IN)).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return root

    return write


IN = "__in__"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("engine/worker", "from millpond.api import app\n"),
        ("engine/worker", "import millpond.api.app\n"),
        ("engine/worker", "from ..api.app import make\n"),
        ("engine/worker", "def late():\n    from millpond.api.app import make\n    return make\n"),
        (
            "engine/worker",
            "import typing\nif typing.TYPE_CHECKING:\n    from millpond.api.app import make\n",
        ),
        ("engine/worker", "import importlib\nimportlib.import_module('millpond.api.app')\n"),
        ("console/pages", "from millpond.api.app import make\n"),
        ("api/routes", "from millpond.settings import Settings\n"),
        ("engine/events", "from millpond.engine.worker import Worker\n"),
        ("engine/somewhere", "from millpond.engine.events import Event\n"),
        ("client/sync", "from millpond.errors import NotFound\n"),
        ("attic/things", "X = 1\n"),
    ],
)
def test_an_import_that_does_not_point_down_is_found(tree, place, text):
    files = {
        "api/app": "def make(): ...\n",
        "engine/worker": "class Worker: ...\n",
        "engine/events": "class Event: ...\n",
        "settings": "class Settings: ...\n",
        "errors": "class NotFound(Exception): ...\n",
        place: text,
    }
    root = tree(**{name.replace("/", IN): body for name, body in files.items()})
    found = violations(root)
    assert len(found) == 1
    assert found[0].startswith("millpond." + place.replace("/", "."))


def test_imports_that_point_down_are_let_pass(tree):
    files = {
        "cli/main": "from millpond.settings import Settings\nfrom millpond.api import app\n",
        "api/app": "from millpond.engine.events import Event\nimport millpond.errors\n",
        "engine/worker": "from .events import Event\nfrom millpond.db.pool import Database\n",
        "engine/events": "class Event: ...\n",
        "db/pool": "from millpond.errors import NotFound\nclass Database: ...\n",
        "retry": "from millpond.errors import NotFound\n",
        "settings": "class Settings: ...\n",
        "errors": "class NotFound(Exception): ...\n",
    }
    root = tree(**{name.replace("/", IN): body for name, body in files.items()})
    assert violations(root) == []
    assert cycles(root) == []


def test_a_circle_is_found_also_through_a_late_import(tree):
    root = tree(
        errors="from millpond.retry import backoff\n",
        retry="def backoff():\n    from millpond.types import Json\n    return Json\n",
        types="import millpond.errors\n",
    )
    assert cycles(root) == [["millpond.errors", "millpond.retry", "millpond.types"]]
