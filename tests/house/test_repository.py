"""The repository is the same for everybody: it names no machine, no registry and no one's home."""

from __future__ import annotations

import re
import tomllib

import pytest

# Built from parts, so that this file does not hold what it looks for.
HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("yarnpkg", "com"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("crates", "io"),
    )
]
FOLDERS = ["/" + name + "/" for name in ("home", "root", "work", "Users", "opt/wheels", "tmp/v")]
FOREIGN = re.compile(
    "|".join(
        [*(re.escape(host) for host in HOSTS), *(r"(?<![\w.*])" + folder for folder in FOLDERS)]
    )
)


def foreign(text: str) -> list[str]:
    """Return every registry host and machine path that `text` names."""
    return FOREIGN.findall(text)


@pytest.mark.parametrize("name", [*HOSTS, *(folder + "x" for folder in FOLDERS)])
def test_a_registry_host_or_machine_path_is_found(name):
    assert foreign(f"see {name} for it")
    assert foreign(f'"{name}"')


def test_paths_that_belong_to_a_product_are_let_pass():
    assert foreign("/v1/runs src/work/x docs/home/ ./root/y /var/lib/millpond") == []


def test_no_file_names_a_registry_host_or_a_path_of_one_machine(tracked, root):
    assert len(tracked) > 30
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(root)}: {name}" for name in foreign(text)]
    assert found == []


def test_what_is_built_is_not_tracked(tracked, root):
    names = {path.relative_to(root).parts[0] for path in tracked}
    assert not names & {
        ".venv",
        ".venv-peers",
        ".demo",
        "build",
        "dist",
        ".mypy_cache",
        ".ruff_cache",
    }
    assert not [path for path in tracked if {"__pycache__", "node_modules"} & set(path.parts)]


def test_the_changelog_tells_of_this_version(root):
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
