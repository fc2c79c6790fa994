"""The demo as a stranger runs it: its kill included, everything it claims true, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from millpond.cli.demo import proof
from millpond.cli.demo.script import QUESTIONS, documents, find_clone, read_text

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.xdist_group("platform")]


def play(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
    return subprocess.run(
        [sys.executable, "-m", "millpond.cli", "demo", *arguments],
        cwd=ROOT,
        env={**kept, "NO_COLOR": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def folder():
    """A temporary folder that the database's system user can pass through, for the demo alone."""
    with tempfile.TemporaryDirectory(
        prefix="millpond-test-demo-", ignore_cleanup_errors=True
    ) as made:
        Path(made).chmod(0o711)
        yield Path(made)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes that mention the folder or work in it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(folder) in word for word in words):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_demo_proves_what_it_claims_and_leaves_nothing(folder):
    result = play(folder)
    shown = result.stdout
    assert result.returncode == 0, shown + result.stderr
    for words in (
        "202 after",
        "kill -9 of the worker",
        "run.rescued",
        "support    queued 0, running 0 of 20 slots, awaiting input 3",
        "✓ no recorded step ran twice",
        "✓ what was recorded before the kill was kept and not run again (2 steps)",
        "✓ waiting runs hold no slot",
        "outcome:  approved by user:developer",
        "outcome:  edited by user:developer",
        "outcome:  written by user:developer",
        "The drafts were written by local:",
        "It proves the plumbing, not judgement",
        "Everything above is true.",
    ):
        assert words in shown, f"{words!r} is missing in:\n{shown}"
    assert "✗" not in shown
    assert "\x1b" not in shown
    assert list(folder.iterdir()) == []
    assert processes_in(folder) == []


STEPS = [
    {"key": "a:0", "name": "a", "state": "done", "output": 1},
    {"key": "b:0", "name": "b", "state": "waiting", "output": None},
]


def told(number, kind, step=None):
    return {"id": number, "kind": kind, "step": step}


def test_a_step_recorded_twice_is_found():
    once = [told(1, "step.succeeded", "a:0"), told(2, "step.succeeded", "b:0")]
    assert proof.ran_twice(once) == []
    assert proof.ran_twice([*once, told(3, "step.succeeded", "a:0")]) == ["a:0"]


def test_a_record_that_changed_after_the_kill_is_found():
    before = {"steps": STEPS}
    done = {"key": "b:0", "name": "b", "state": "done", "output": 2}
    assert proof.changed_since(before, {"steps": [STEPS[0], done]}) == []
    assert proof.changed_since(before, {"steps": [{**STEPS[0], "output": 9}, done]}) == ["a:0"]
    assert proof.changed_since(before, {"steps": [done]}) == ["a:0"]


def test_a_recorded_step_that_moves_after_the_rescue_is_found():
    events = [
        told(1, "step.succeeded", "a:0"),
        told(2, "run.rescued"),
        told(3, "step.started", "b:0"),
    ]
    assert proof.touched_after_rescue({"steps": STEPS}, events) == []
    again = [*events, told(4, "step.started", "a:0")]
    assert proof.touched_after_rescue({"steps": STEPS}, again) == ["a:0"]


def test_a_gap_in_the_numbers_is_found():
    assert proof.numbers_have_no_gap([told(1, "x"), told(2, "x")])
    assert not proof.numbers_have_no_gap([told(1, "x"), told(3, "x")])
    assert not proof.numbers_have_no_gap([told(2, "x"), told(1, "x")])


def test_words_that_no_document_holds_are_found():
    texts = {path.name: read_text(path) for path in documents(find_clone())}
    good = {"document": "returns-policy.md", "quote": "within **60 days of delivery**"}
    invented = {"document": "returns-policy.md", "quote": "within 600 days of delivery"}
    elsewhere = {"document": "ember-2-manual.pdf", "quote": "within 60 days of delivery"}
    assert proof.uncited([good], texts) == []
    assert len(proof.uncited([good, invented, elsewhere], texts)) == 2


def test_the_shipped_documents_are_two_and_one_question_has_no_answer_in_them():
    assert len(documents(find_clone())) == 2
    assert [question.is_answerable for question in QUESTIONS].count(False) == 1


def start_demo(folder: Path) -> subprocess.Popen[str]:
    """Start the demo and return once its platform is up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond.cli", "demo"],
        cwd=ROOT,
        env={**kept, "NO_COLOR": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "ready after" in line:
            return process
    raise AssertionError("the demo did not start")


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_leaves_nothing(folder):
    process = start_demo(folder)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "The demo was stopped." in said
    assert "Traceback" not in said
    assert list(folder.iterdir()) == []
    assert processes_in(folder) == []


@pytest.mark.slow
def test_what_a_killed_demo_left_is_swept_by_the_next_one(folder):
    process = start_demo(folder)
    process.kill()
    process.communicate(timeout=60)
    assert len(list(folder.glob("millpond-demo-*"))) == 1
    process = start_demo(folder)
    assert len(list(folder.glob("millpond-demo-*"))) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert list(folder.iterdir()) == []
    until = time.monotonic() + 60
    while processes_in(folder):  # the killed one's API and worker end by themselves
        assert time.monotonic() < until, processes_in(folder)
        time.sleep(0.05)
