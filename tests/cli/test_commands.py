"""Commands against a real server: what they print, what they return, how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from tests.cli.conftest import ROOT, clean_environment

pytestmark = pytest.mark.xdist_group("platform")


def asked_by(run_id, cli_json):
    """The question that a run asks, once it does."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for request in cli_json("inputs", "list", "--limit", "100")["data"]:
            if request["run_id"] == run_id:
                return request
    raise AssertionError("the run asked nothing")


def test_start_waits_and_shows_the_result(cli_json):
    run = cli_json("runs", "start", "sample.shout", "-i", '{"word": "hi"}', "--wait")
    assert (run["object"], run["state"], run["output"]) == ("run", "succeeded", {"word": "HI"})
    assert [step["name"] for step in run["steps"]] == ["sample.shout"]


def test_steps_in_a_process_and_in_another_queue_run_under_the_real_worker(cli_json):
    run = cli_json("runs", "start", "sample.elsewhere", "-i", '{"word": "pond"}', "--wait")
    assert run["output"] == {"back": "dnop", "count": 4}
    assert [step["tries"] for step in run["steps"]] == [1, 1]


def test_start_takes_its_input_from_stdin(cli_json):
    run = cli_json("runs", "start", "sample.shout", "-i", "-", "--wait", stdin='{"word": "in"}')
    assert run["output"] == {"word": "IN"}


def test_start_without_wait_tells_the_accepted_run(cli_json):
    run = cli_json("runs", "start", "sample.wait", "--label", "a=b", "--priority", "5")
    assert run["state"] in ("queued", "scheduled")
    shown = cli_json("runs", "show", run["id"])
    assert (shown["labels"], shown["priority"]) == ({"a": "b"}, 5)


def test_an_idempotency_key_returns_the_first_run(cli_json):
    arguments = ("runs", "start", "sample.shout", "--idempotency-key", "cli-once")
    assert cli_json(*arguments)["id"] == cli_json(*arguments)["id"]


def test_a_file_of_runs_is_started_at_once(cli, cli_json, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"input": {"word": "a"}}\n\n{"flow": "sample.wait", "labels": {"n": "2"}}\n')
    arguments = ("runs", "start", "sample.shout", "--batch", str(path), "--label", "n=1")
    answer = cli_json(*arguments, "--idempotency-key", "cli-batch")
    shown = [cli_json("runs", "show", run_id) for run_id in answer["ids"]]
    assert [run["flow"] for run in shown] == ["sample.shout", "sample.wait"]
    assert [run["labels"] for run in shown] == [{"n": "1"}, {"n": "2"}]
    assert cli_json(*arguments, "--idempotency-key", "cli-batch") == answer
    assert cli(*arguments).stdout.count("accepted") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1 is not JSON"), ("{}\n7", "line 2 is no JSON object"), ("{}", "runs[0].flow")],
)
def test_a_bad_line_of_a_file_is_named(cli, text, words):
    result = cli("runs", "start", "--batch", "-", stdin=text)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_live_run_with_the_key_is_joined_or_named(cli, cli_json):
    key = ("--dedup-key", "cli-key", "--delay", "3600")
    run = cli_json("runs", "start", "sample.wait", *key)
    joined = cli("runs", "start", "sample.wait", *key, "--on-duplicate", "join")
    assert f"run {run['id']} scheduled (live already)" in joined.stdout
    refused = cli("runs", "start", "sample.wait", *key)
    assert refused.exit_code == 6
    assert run["id"] in refused.stderr
    newer = cli_json("runs", "start", "sample.wait", *key, "--on-duplicate", "cancel_old")
    assert cli_json("runs", "show", run["id"])["state"] == "cancelled"
    assert cli("runs", "cancel", newer["id"]).exit_code == 0


def test_a_paused_flow_holds_its_runs_and_tells_so(cli, cli_json):
    held = cli("pause", "flow", "sample.wait", "--reason", "repairs")
    assert held.stdout == "flow:sample.wait is paused by user:developer; its work stands queued\n"
    try:
        run = cli_json("runs", "start", "sample.wait", "--deadline", "3600")
        told = cli("runs", "why", run["id"]).stdout
        assert "is queued" in told
        assert "paused: Flow sample.wait is paused by user:developer since" in told
        assert "has to be over by" in told
        assert cli_json("runs", "why", run["id"])["reasons"][0]["reason"] == "repairs"
        assert "repairs" in cli("pauses").stdout
        assert "flow" in cli("flows").stdout
    finally:
        assert cli("resume", "flow", "sample.wait").stdout == "flow sample.wait goes on\n"
    assert cli("resume", "flow", "sample.wait").stdout == "flow sample.wait was not paused\n"
    cli("runs", "cancel", run["id"])


@pytest.mark.parametrize(
    ("scope", "shown"),
    [
        (("queue", "sql"), "queue:sql"),
        (("queue", "sql", "--everyone"), "everyone:sql"),
        (("org",), "org"),
    ],
)
def test_queues_and_orgs_are_paused_and_resumed(cli, cli_json, scope, shown):
    assert cli_json("pause", *scope)["id"] == shown
    (sql,) = [one for one in cli_json("queues")["data"] if one["name"] == "sql"]
    assert [one["id"] for one in sql["pauses"]] == [shown]
    assert cli_json("resume", *scope)["was_paused"]
    assert cli("pauses").stdout == "Nothing is paused.\n"


def test_limits_are_set_listed_and_removed(cli, cli_json):
    assert cli("limits", "list").stdout == "Nothing is limited.\n"
    told = cli("limits", "set", "model:mini", "--concurrency", "2").stdout
    assert told == "model:mini: 2 at once\n"
    rate = cli_json("limits", "set", "model:mini", "--rate", "60", "--period", "60")
    assert (rate["maximum"], rate["period_s"], rate["burst"]) == (60, 60.0, 1)
    shared = cli("limits", "set", "org:* x model:mini", "--concurrency", "1", "--everyone")
    assert shared.exit_code == 0, shared.stderr
    listed = cli("limits", "list").stdout
    for part in ("2 at once", "60 in 60 s, 1 at once", "org:*×model:mini", "platform"):
        assert part in listed
    assert cli("limits", "brakes").stdout == "Nothing is held back.\n"
    assert cli("limits", "brakes", "--everyone").stdout == "Nothing is held back.\n"
    assert "there is no brake on model:mini" in cli("limits", "reset", "model:mini").output
    assert "org" in cli("limits", "saturation").stdout
    assert cli_json("limits", "saturation")["data"][0]["of"] == "org"
    assert "full 1 min" in cli("limits", "saturation", "--starved-after", "5").stdout
    everyone = cli_json("limits", "saturation", "--everyone")
    assert {one["of"] for one in everyone["data"]} >= {"queue"}
    assert "default" in cli("limits", "saturation", "--everyone", "--of", "queue").stdout
    assert cli("limits", "saturation", "--of", "queue").exit_code != 0
    assert cli("limits", "set", "model:mini").exit_code != 0
    tokens = ("limits", "set", "provider:x", "--tokens", "90000", "--period", "60")
    assert cli(*tokens).stdout == "provider:x: 90000 tokens in 60 s, 90000 at once\n"
    assert cli_json(*tokens, "--burst", "500")["burst"] == 500
    small = ("runs", "start", "sample.shout", "--key", "provider:x", "--tokens")
    assert cli_json(*small, "500", "--wait")["state"] == "succeeded"
    cli(*tokens, "--burst", "500")
    assert "never has more than 500 at once" in cli(*small, "501").output
    assert cli("limits", "remove", "provider:x", "--tokens").stdout == "provider:x: removed\n"
    assert cli("limits", "remove", "model:mini", "--rate").stdout == "model:mini: removed\n"
    assert cli("limits", "remove", "model:mini").exit_code == 0
    assert cli("limits", "remove", "org:* x model:mini", "--everyone").exit_code == 0
    assert cli("limits", "list").stdout == "Nothing is limited.\n"


def test_other_limits_are_simulated_over_recorded_runs_and_nothing_is_changed(cli, cli_json):
    for _ in range(3):
        cli_json("runs", "start", "sample.shout", "--wait")
    report = cli_json(
        "limits", "simulate", "--set", "flow:sample.shout concurrency=1", "--since", "1h"
    )
    (of_flow,) = [one for one in report["waits"] if one["flow"] == "sample.shout"]
    assert of_flow["recorded"]["runs"] == of_flow["after"]["runs"] >= 3
    assert report["slots"]["default"] == 100
    assert [one["key"] for one in report["limits"]] == ["flow:sample.shout"]
    shown = cli("limits", "simulate", "--set", "flow:sample.shout concurrency=0", "--since", "1h")
    assert "never" in shown.stdout
    assert cli("limits", "list").stdout == "Nothing is limited.\n"
    other = cli("limits", "simulate", "--set", "org:other concurrency=1")
    assert other.exit_code != 0
    assert "limits its own work" in other.stderr
    unknown = cli("limits", "simulate", "--remove", "model:none concurrency")
    assert "there is no concurrency limit on model:none" in unknown.stderr
    of_all = cli_json("limits", "simulate", "--set", "org:* concurrency=1", "--everyone")
    assert {one["org"] for one in of_all["waits"]} > {None}


def test_workers_are_listed(cli, cli_json, up):
    (worker,) = cli_json("workers")["data"]
    assert worker["pid"] == up.worker_pid
    shown = cli("workers").stdout
    assert worker["id"] in shown
    assert re.search(r"default \d+/100", shown)


def test_a_failed_run_ends_with_1(cli):
    result = cli("runs", "start", "sample.fail", "--wait", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "sample_refusal"


def test_tail_prints_one_event_a_line_and_ends_by_the_outcome(cli, cli_json):
    run = cli_json("runs", "start", "sample.fail")
    result = cli("runs", "tail", run["id"], "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["kind"] == "run.failed"
    later = cli("runs", "tail", run["id"], "--json", "--after", str(len(events) - 1))
    assert later.stdout.splitlines() == result.stdout.splitlines()[-1:]


def test_tail_gives_up_after_its_timeout_and_the_run_goes_on(cli, cli_json):
    run = cli_json("runs", "start", "sample.wait")
    result = cli("runs", "tail", run["id"], "--timeout", "0.5")
    assert result.exit_code == 7
    assert "millpond runs tail" in result.stderr
    assert cli_json("runs", "show", run["id"])["state"] not in ("failed", "cancelled")


def test_a_run_is_cancelled_and_asking_again_is_no_error(cli, cli_json):
    run = cli_json("runs", "start", "sample.wait")
    assert cli("runs", "cancel", run["id"], "--reason", "test").exit_code == 0
    assert cli("runs", "tail", run["id"]).exit_code == 1
    assert cli_json("runs", "show", run["id"])["state"] == "cancelled"
    assert cli("runs", "cancel", run["id"]).exit_code == 0


def test_a_run_is_told_something_once(cli, cli_json):
    run = cli_json("runs", "start", "sample.listen")
    told = ("runs", "signal", run["id"], "word", "--data", '{"is": "said"}')
    sent = cli_json(*told, "--idempotency-key", "told-once")
    assert (sent["object"], sent["name"]) == ("signal", "word")
    assert cli("runs", "tail", run["id"]).exit_code == 0
    shown = cli_json("runs", "show", run["id"])
    assert (shown["output"], shown["state_values"]) == ({"is": "said"}, {"ear": "open"})
    assert "open" in cli("runs", "show", run["id"]).stdout
    assert cli_json(*told, "--idempotency-key", "told-once") == sent
    assert cli(*told).exit_code == 6


def test_runs_are_listed_by_filter_and_page(cli_json):
    run = cli_json("runs", "start", "sample.fail")
    first = cli_json("runs", "list", "--flow", "sample.fail", "--limit", "1")
    assert first["data"][0]["id"] == run["id"]
    cli_json("runs", "start", "sample.fail")
    page = cli_json("runs", "list", "--flow", "sample.fail", "--limit", "1")
    assert page["has_more"]
    after = cli_json("runs", "list", "--flow", "sample.fail", "--after", page["last_id"])
    assert after["data"][0]["id"] == run["id"]


def test_a_question_is_listed_shown_and_answered(cli, cli_json):
    run = cli_json("runs", "start", "sample.ask")
    request = asked_by(run["id"], cli_json)
    shown = cli_json("inputs", "show", request["id"])
    assert shown["proposal"] == {"word": "hello"}
    wrong = cli("inputs", "resolve", request["id"], "-a", '{"is_right": "perhaps"}')
    assert wrong.exit_code == 2
    stale = cli(
        "inputs", "resolve", request["id"], "-a", '{"is_right": true}', "--digest", "0" * 64
    )
    assert stale.exit_code == 6
    cli_json("inputs", "resolve", request["id"], "-a", '{"is_right": true}')
    assert cli("runs", "tail", run["id"]).exit_code == 0
    output = cli_json("runs", "show", run["id"])["output"]
    assert output == {"is_right": True, "by": "user:developer"}
    assert cli("inputs", "resolve", request["id"], "-a", '{"is_right": true}').exit_code == 6


def test_flows_and_queues_are_listed(cli, cli_json):
    flows = {flow["name"]: flow for flow in cli_json("flows")["data"]}
    assert flows["sample.shout"]["input_schema"]["properties"]["word"]["type"] == "string"
    queues = {queue["name"]: queue for queue in cli_json("queues")["data"]}
    assert queues["default"]["slots"] == 100
    assert "sample.shout" in cli("flows").stdout
    assert "default" in cli("queues").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("runs", "start", "no.such.flow"), 3, "no.such.flow"),
        (("runs", "show", "00000000-0000-7000-8000-000000000000"), 3, "does not exist"),
        (("runs", "start", "sample.shout", "-i", '{"word": 3}'), 2, "input.word"),
        (("runs", "start", "sample.shout", "-i", "{"), 2, "not JSON"),
        (("runs", "start"), 2, "name the flow"),
        (("runs", "why"), 2, "Missing argument"),
        (("runs", "list", "--token", "nonsense"), 4, "token"),
        (("runs", "list", "--url", "http://127.0.0.1:9"), 5, "cannot be reached"),
    ],
)
def test_an_expected_error_is_one_line_with_its_exit_code(arguments, code, words, cli):
    result = cli(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_without_a_token_the_call_is_refused(cli, tmp_path):
    result = cli("runs", "list", MILLPOND_DATA_DIR=str(tmp_path))
    assert result.exit_code == 4
    assert "millpond login" in result.stderr


def test_doctor_finds_everything_in_order(cli):
    result = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)["data"]}
    assert checks["workers"]["state"] == "ok"
    assert checks["rights of app"]["state"] == "ok"
    assert checks["rights of engine"]["state"] == "ok"
    assert checks["schema as app"]["state"] == "ok"
    failed = [check for check in checks.values() if check["state"] == "failed"]
    assert failed == []
    assert result.exit_code == 0


def test_doctor_says_what_to_do_about_a_database_that_is_away(cli):
    away = "postgresql://app:pw@127.0.0.1:9/db"
    result = cli("doctor", "--json", MILLPOND_DATABASE_URL=away)
    checks = {check["name"]: check for check in json.loads(result.stdout)["data"]}
    assert result.exit_code == 1
    assert checks["database as app"]["state"] == "failed"
    assert checks["database as app"]["advice"]
    assert "pw@" not in result.stdout


def test_doctor_refuses_a_role_that_could_read_everything(cli, server):
    admin = server.admin_url("millpond")
    result = cli("doctor", "--json", MILLPOND_DATABASE_URL=admin)
    checks = {check["name"]: check for check in json.loads(result.stdout)["data"]}
    assert checks["rights of app"]["state"] == "failed"
    assert "superuser" in checks["rights of app"]["found"]


def test_a_new_token_is_written_but_not_printed_where_there_is_no_terminal(cli, up):
    before = (up.data_dir / "token").read_text()
    result = cli("token", "--json")
    document = json.loads(result.stdout)
    assert document["file"] == str(up.data_dir / "token")
    assert "token" not in document
    assert (up.data_dir / "token").read_text() != before
    assert cli("runs", "list").exit_code == 0


def test_there_is_no_development_token_for_an_external_database(cli):
    result = cli("token", MILLPOND_DATABASE_URL="postgresql://app:pw@127.0.0.1:9/db")
    assert result.exit_code == 4


def test_there_is_no_development_token_without_a_running_platform(invoke, tmp_path):
    assert invoke("token", "--data-dir", str(tmp_path)).exit_code == 5


def test_documents_are_added_listed_and_found(cli, cli_json, tmp_path):
    (tmp_path / "pond.md").write_text(
        "# The pond\n\nThe mill wheel turns at seven in the morning.\n"
    )
    runs = cli_json("kb", "add", "cli-base", str(tmp_path))
    assert [run["state"] for run in runs["data"]] == ["succeeded"]
    documents = cli_json("kb", "list", "cli-base")["data"]
    assert [(one["filename"], one["state"]) for one in documents] == [("pond.md", "ready")]
    found = cli_json("kb", "search", "cli-base", "When does the mill wheel turn?")
    assert "seven in the morning" in found["data"][0]["text"]
    assert "pond.md" in cli("kb", "list", "cli-base").stdout
    assert "seven in the morning" in cli("kb", "search", "cli-base", "mill wheel").stdout
    assert cli("kb", "list", "no-such-base").exit_code == 3


def test_a_file_that_is_no_document_fails_with_its_reason(cli, tmp_path):
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 not really")
    result = cli("kb", "add", "cli-base", str(tmp_path / "broken.pdf"), "--json")
    assert result.exit_code == 1
    documents = json.loads(cli("kb", "list", "cli-base", "--json").stdout)["data"]
    [broken] = [one for one in documents if one["filename"] == "broken.pdf"]
    assert broken["state"] == "failed"
    assert broken["reason"]


def check_flows(up, flows, *options):
    """Run `millpond flows check` in a process of its own: it imports flows."""
    command = [sys.executable, "-m", "millpond.cli", "flows", "check", "--flows", flows, "--json"]
    done = subprocess.run(
        [*command, "--data-dir", str(up.data_dir), *options],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def test_flows_check_tells_changed_code_from_code_that_fits(up, cli_json):
    run = cli_json("runs", "start", "sample.wait")
    until = time.monotonic() + 30
    while cli_json("runs", "show", run["id"])["state"] != "waiting":
        assert time.monotonic() < until
    code, found = check_flows(up, "tests.cli.sample_flows", "--flow", "sample.wait")
    assert (code, found["mismatches"]) == (0, 0)
    assert run["id"] in {one["run_id"] for one in found["data"]}
    code, found = check_flows(
        up, "tests.cli.changed_flows", "--flow", "sample.wait", "--limit", "50"
    )
    assert code == 1
    (one,) = [one for one in found["data"] if one["run_id"] == run["id"]]
    assert one["result"] == "mismatch"
    assert "shout:0" in one["message"]
    assert "long:0" in one["message"]
    code, _ = check_flows(up, "tests.cli.sample_flows", "--flow", "no.such")
    assert code == 3


def test_only_a_blocked_run_is_resumed(cli, cli_json):
    run = cli_json("runs", "start", "sample.wait")
    refused = cli("runs", "resume", run["id"])
    assert refused.exit_code == 6
    assert "not blocked" in refused.stderr
    assert cli("runs", "cancel", run["id"], "--skip-endings").exit_code == 0
