"""What the command line does without a server: reading input, exit codes, words, redaction."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from millpond.cli import timeline
from millpond.cli.config import (
    Databases,
    child_environment,
    is_loopback,
    queue_slots,
    read_settings,
    spill_of,
    worker_labels,
)
from millpond.cli.exit import MEANINGS, ExitCode, Interrupted, TimedOut, exit_code
from millpond.cli.kb import collect
from millpond.cli.logs import configure_logging
from millpond.cli.options import joined_labels, read_json, read_pairs
from millpond.cli.output import plain, print_table
from millpond.cli.remote import find_token
from millpond.cli.workers import alone_command
from millpond.engine.spilling import Spill
from millpond.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    Permanent,
    SchemaMismatch,
    Unauthenticated,
    Unavailable,
)

EVENT = {
    "run_id": "r",
    "id": 3,
    "kind": "step.failed",
    "step": "draft:0",
    "data": {
        "name": "draft",
        "tries": 2,
        "duration_s": 1.25,
        "error": {"code": "timeout", "message": "too slow\x1b[2J"},
    },
    "at": "2026-01-02T03:04:05.678Z",
}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), 2),
        (NotFound("x"), 3),
        (Forbidden("x"), 4),
        (Unauthenticated("x"), 4),
        (Unavailable("x"), 5),
        (Conflict("x"), 6),
        (SchemaMismatch("x"), 6),
        (TimedOut("x"), 7),
        (Interrupted("x"), 130),
        (Permanent("x"), 1),
    ],
)
def test_each_class_of_error_has_its_exit_code(error, code):
    assert exit_code(error) == code


def test_every_exit_code_is_explained_in_the_help(invoke):
    assert set(MEANINGS) == set(ExitCode)
    words = " ".join(invoke("--help").stdout.split())
    for code in ExitCode:
        assert f"{code.value}: {MEANINGS[code].split(':')[0]}" in words


@pytest.mark.parametrize(
    "group", [(), ("runs",), ("inputs",), ("kb",), ("up",), ("runs", "start"), ("doctor",)]
)
def test_help_exists_for(group, invoke):
    result = invoke(*group, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_input_is_read_from_text_file_and_stdin(tmp_path, monkeypatch):
    (tmp_path / "in.json").write_text('{"a": "ü"}')
    monkeypatch.setattr("sys.stdin", io.StringIO("[1]"))
    assert read_json('{"a": 1}', param="--input") == {"a": 1}
    assert read_json(f"@{tmp_path}/in.json", param="--input") == {"a": "ü"}
    assert read_json("-", param="--input") == [1]


@pytest.mark.parametrize("text", ["{", "@/nowhere/in.json", ""])
def test_unreadable_input_names_the_option(text):
    with pytest.raises(InvalidInput) as caught:
        read_json(text, param="--input")
    assert caught.value.param == "--input"


def test_pairs_need_a_name_and_a_value():
    assert read_pairs(["a=b=c", "d="], param="--label") == {"a": "b=c", "d": ""}
    with pytest.raises(InvalidInput):
        read_pairs(["=b"], param="--label")


def test_text_from_outside_cannot_steer_the_terminal():
    assert plain("a\x1b]0;title\x07b\u202ec\nd\te") == "a]0;titlebc\nd\te"
    line = timeline.event_line(EVENT).plain
    assert "\x1b" not in line
    assert "step.failed" in line
    assert "draft 1.25 s try 2 timeout: too slow" in line


def test_event_times_can_be_counted_from_a_moment():
    since = timeline.parse_time("2026-01-02T03:04:00Z")
    assert "+5.68 s" in timeline.event_line(EVENT, since=since).plain


def test_queues_are_read_with_their_slots():
    assert queue_slots(read_settings(queues="a:1, b:20")) == {"a": 1, "b": 20}


@pytest.mark.parametrize("text", ["a", "a:0", ":3", "a:x", ","])
def test_malformed_queues_name_the_variable(text):
    with pytest.raises(InvalidInput) as caught:
        queue_slots(read_settings(queues=text))
    assert caught.value.param == "MILLPOND_QUEUES"


def test_whom_idle_slots_help_is_read_in_order():
    settings = read_settings(
        queues="a:4,b:2", spill="a:sql+b, b:a", spill_keep="a:3", reserve="b:1"
    )
    assert spill_of(settings, queue_slots(settings)) == Spill(
        helps={"a": ["sql", "b"], "b": ["a"]}, keep={"a": 3}, reserve={"b": 1}
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("spill", text) for text in ("a", "a:", ":b", "a:a", "a:b+", "a:b+b", "a:b,a:c", "c:a")),
        *(("spill_keep", text) for text in ("a", "a:0", "a:4", "c:1")),
        *(("reserve", text) for text in ("a", "a:x", "a:4", "c:1")),
    ],
)
def test_what_slots_cannot_do_names_the_variable(name, text):
    settings = read_settings(queues="a:4,b:2", **{name: text})
    with pytest.raises(InvalidInput) as caught:
        spill_of(settings, queue_slots(settings))
    assert caught.value.param == f"MILLPOND_{name.upper()}"


def test_processes_that_are_started_get_what_was_said_of_slots():
    settings = read_settings(queues="a:4", spill="a:b", spill_keep="a:1", reserve="a:2")
    named = child_environment(settings, Databases(app="", engine=None, owner=None, listen=None))
    assert [named[f"MILLPOND_{one}"] for one in ("SPILL", "SPILL_KEEP", "RESERVE")] == [
        "a:b",
        "a:1",
        "a:2",
    ]
    command = alone_command(settings, "worker")
    assert command[command.index("--spill") + 1] == "a:b"


def test_a_wrong_setting_is_named_and_its_value_is_not_shown(invoke):
    result = invoke("doctor", MILLPOND_LEASE_S="hunter2")
    assert result.exit_code == 2
    assert "MILLPOND_LEASE_S" in result.stderr
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("pond", False)],
)
def test_loopback_is_told_from_the_rest(host, expected):
    assert is_loopback(host) is expected


def test_the_development_token_is_sent_to_this_machine_only(tmp_path):
    (tmp_path / "token").write_text("dev\n")
    assert find_token(None, "http://127.0.0.1:8080", tmp_path) == "dev"
    assert find_token(None, "https://pond.example", tmp_path) is None
    assert find_token("mine", "https://pond.example", tmp_path) == "mine"


def test_folders_are_walked_for_documents_and_hidden_files_left_out(tmp_path):
    for name in ("a.md", "sub/b.PDF", ".git/c.md", "d.exe"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert [name for name, _ in collect([tmp_path])] == ["a.md", "sub/b.PDF"]
    with pytest.raises(InvalidInput):
        collect([tmp_path / ".git" / "nothing"])
    with pytest.raises(InvalidInput):
        collect([Path(tmp_path / "sub" / "..").resolve() / ".git", tmp_path / "missing"])


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(request):
    """Logging as a long-running command sets it up, into text; undone afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = getattr(request, "param", io.StringIO)()
    configure_logging("info", process="worker", stream=stream)
    yield stream
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_logs_are_json_lines_with_the_process_that_wrote_them(log):
    structlog.get_logger("millpond.x").info("started", run_id="r1")
    logging.getLogger("uvicorn.error").warning("odd %s", "thing")
    ours, theirs = [json.loads(line) for line in log.getvalue().splitlines()]
    assert (ours["event"], ours["run_id"], ours["process"]) == ("started", "r1", "worker")
    assert (theirs["event"], theirs["level"]) == ("odd thing", "warning")


def test_logs_hide_secrets(log):
    secret = "s3cret-value"
    token = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ4In0.c2ln"
    try:
        raise ValueError(f"postgresql://app:{secret}@host/db")
    except ValueError:
        structlog.get_logger("millpond.x").exception(
            "failed",
            password=secret,
            url=f"postgresql://app:{secret}@host/db",
            headers={"Authorization": secret, "x": [f"Bearer {secret}"]},
            said=f"token {token}",
        )
    written = log.getvalue()
    assert "failed" in written
    assert "ValueError" in written
    assert secret not in written
    assert token not in written


@pytest.mark.parametrize("log", [io.StringIO, _Terminal], indirect=True)
def test_a_failure_is_logged_by_class_and_line_and_without_any_value(log):
    prompt = "my private question"
    try:
        try:
            raise KeyError(prompt)
        except KeyError as cause:
            raise ValueError(f"cannot read {prompt}") from cause
    except ValueError:
        structlog.get_logger("millpond.x").exception("failed")
    written = log.getvalue()
    assert "ValueError" in written
    assert "KeyError" in written
    assert "test_pure.py" in written
    assert prompt not in written


def test_labels_of_a_worker_are_names_with_values() -> None:
    assert worker_labels(read_settings(labels="")) == {}
    joined = joined_labels(["gpu=true", "zone=eu-1"])
    assert worker_labels(read_settings(labels=joined)) == {"gpu": "true", "zone": "eu-1"}
    with pytest.raises(InvalidInput) as caught:
        worker_labels(read_settings(labels="gpu"))
    assert caught.value.param == "MILLPOND_LABELS"


def test_a_column_that_is_to_be_read_whole_is_not_folded_by_a_long_neighbour(capsys):
    cells = ["a" * 36, "h" * 250, "default 0/100"]
    print_table(["id", "host", "in use"], [cells], empty="", whole=("id", "in use"))
    shown = capsys.readouterr().out
    assert "a" * 36 in shown
    assert "default 0/100" in shown
