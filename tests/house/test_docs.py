"""The documentation is true: names what exists, links to what is there, and its examples run."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys

import pytest
import typer.main

from millpond.cli.main import app
from millpond.engine.events import FINAL_EVENTS

KIND = re.compile(r"(?:run|step|sleep|input|signal|child|value|state)\.[a-z_]+|secret\.opened")
# Their kinds are put together from the state in which a run rests.
RESTING = {"run.waiting", "run.awaiting_input"}
# Told in the audit log, not to those who follow a run.
AUDITED = {"run.refused", "run.rerun"}


@pytest.fixture(scope="module")
def pages(root, tracked):
    """Return the text of every Markdown page by its path in the repository."""
    return {
        path.relative_to(root): path.read_text(encoding="utf-8")
        for path in tracked
        if path.suffix == ".md" and path.relative_to(root).parts[0] not in ("examples", "tests")
    }


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(pages) -> list[tuple[str, list[str]]]:
    """Return every shell command of the documentation as (page, words)."""
    found = []
    for page, text in pages.items():
        for block in blocks(text, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append((str(page), words))
    return found


def test_generated_parts_are_up_to_date(root):
    done = subprocess.run(
        [sys.executable, root / "scripts" / "reference.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_link_leads_somewhere(root, pages):
    broken = []
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if "://" in path or path.startswith("mailto:"):
                continue
            file = (root / page).parent / path if path else root / page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page}: {target}")
    assert broken == []


def anchors(file) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_can_be_reached_from_the_readme(root, pages):
    seen, queue = set(), [root / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and (page.parent / target).is_file():
                queue.append((page.parent / target).resolve())
    assert {root / page for page in pages} - seen == set()


def test_make_commands_of_the_docs_are_targets(root, pages):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = [words for _, words in commands(pages) if words[0] == "make"]
    named += [
        [*found.split()]
        for text in pages.values()
        for found in re.findall(r"`(make [a-z-]+)`", text)
    ]
    assert ["make", "demo"] in named
    assert ["make", "test"] in named
    assert [words for words in named if words[1] not in targets] == []


def test_readme_begins_with_the_demo_then_the_tests(root):
    shell = "".join(blocks((root / "README.md").read_text(encoding="utf-8"), "sh"))
    assert [line.split("#")[0].strip() for line in shell.splitlines()][:2] == [
        "make demo",
        "make test",
    ]


def test_millpond_commands_of_the_docs_exist_with_their_options(pages):
    called = [
        (page, words[1:])
        for page, words in commands(pages)
        if words[0].removeprefix(".venv/bin/") == "millpond"
    ]
    assert len(called) > 10
    assert [problem for page, words in called if (problem := misfit(page, words))] == []


@functools.cache
def whole_command():
    """Return `millpond` with all of its commands, which takes a while to make."""
    return typer.main.get_command(app)


def misfit(page: str, words: list[str]) -> str | None:
    """Return what is wrong with a `millpond` command line, if anything."""
    command = whole_command()
    rest = list(words)
    while hasattr(command, "commands") and rest:
        name = rest.pop(0)
        option = next((item for item in command.params if name in item.opts), None)
        if option is not None:  # stands before the command
            rest = rest if option.is_flag else rest[1:]
            continue
        if name not in command.commands:
            return f"{page}: {' '.join(words)}: no command {name}"
        command = command.commands[name]
    known = {name for item in command.params for name in [*item.opts, *item.secondary_opts]}
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    unknown = given - known
    return f"{page}: {' '.join(words)}: {sorted(unknown)}" if unknown else None


def test_every_kind_of_event_is_documented_and_no_other(root, pages):
    written = {"progress"} | RESTING | FINAL_EVENTS
    for path in (root / "src").rglob("*.py"):
        written |= kinds(path.read_text(encoding="utf-8"))
    for path in (root / "src").rglob("*.sql"):
        written |= {
            found[0] for found in re.finditer(rf"(?<=')(?:{KIND.pattern})(?=')", path.read_text())
        }
    rows = re.findall(
        r"^\| `([a-z_.]+)` \|", (root / "docs/events.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) == len(set(rows))
    assert set(rows) == written - AUDITED


def kinds(source: str) -> set[str]:
    """Return the event kinds that Python source names, other than as names of log lines."""
    tree = ast.parse(source)
    logged = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "_log"
        and node.args
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and KIND.fullmatch(node.value)
        and id(node) not in logged
    }


def test_kinds_are_found_in_calls_but_not_in_log_lines():
    source = "_log.info('run.lost')\nappend(Fact('run.queued'))\nx = 'step.done'\ny = 'run.* '\n"
    assert kinds(source) == {"run.queued", "step.done"}


def test_decisions_have_context_decision_and_consequences(pages):
    records = {page: text for page, text in pages.items() if page.parent.name == "decisions"}
    assert len(records) >= 4
    for page, text in records.items():
        for part in ("**Context.**", "**Decision.**", "**Consequences.**"):
            assert part in text, f"{page} has no {part}"


def test_no_page_claims_a_rate_without_a_command(pages):
    rate = re.compile(r"\d[\d,.]*\s*(?:k\s*)?(?:/s\b|per second|runs/s)")
    claims = [
        page for page, text in pages.items() if rate.search(text) and "make bench" not in text
    ]
    assert claims == []


def test_the_status_page_names_only_tests_that_exist(root, pages):
    (text,) = [text for page, text in pages.items() if page.name == "status.md"]
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    gone = [
        f"{path}::{test}"
        for path, test in named
        if not (root / path).is_file()
        or (test and f"def {test}(" not in (root / path).read_text(encoding="utf-8"))
    ]
    assert gone == []
