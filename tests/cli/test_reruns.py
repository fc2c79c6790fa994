"""Repeating and cancelling by command, one run or many; pruning by hand."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import run_command

from millpond.cli.prune import read_duration_s
from millpond.errors import InvalidInput


def start(cli_json, flow, *options, data="{}"):
    return cli_json("runs", "start", flow, "--input", data, *options)["id"]


def test_a_run_is_repeated_with_another_input(cli, cli_json):
    first = start(cli_json, "sample.shout", "--wait", data='{"word": "one"}')
    result = cli("runs", "rerun", first, "--input", '{"word": "two"}', "--wait", "--json")
    assert result.exit_code == 0, result.stderr
    run = json.loads(result.stdout)
    assert (run["output"], run["rerun_of"]) == ({"word": "TWO"}, first)
    assert first in cli("runs", "show", run["id"]).stdout
    assert run["id"] in cli("runs", "show", first).stdout


def test_a_run_is_repeated_from_a_step(cli, cli_json):
    first = start(cli_json, "sample.shout", "--wait", data='{"word": "one"}')
    (step,) = cli_json("runs", "show", first)["steps"]
    run = cli_json("runs", "rerun", first, "--from-step", step["key"], "--wait")
    assert (run["state"], run["rerun_from"]) == ("succeeded", step["key"])
    wrong = cli("runs", "rerun", first, "--from-step", "sample.shoud:0")
    assert wrong.exit_code == 2
    assert step["key"] in wrong.stderr


def test_only_poison_is_released(cli, cli_json):
    first = start(cli_json, "sample.shout", "--wait")
    result = cli("runs", "release", first)
    assert result.exit_code == 6
    assert "poison" in result.stderr


def test_many_runs_are_cancelled_after_they_were_counted(cli, cli_json):
    runs = [start(cli_json, "sample.wait", "--label", "batch=cli") for _ in range(3)]
    wanted = ("--all", "--flow", "sample.wait", "--label", "batch=cli")
    told = cli("runs", "cancel", *wanted, "--dry-run")
    assert "3 runs" in told.stdout
    assert cli_json("runs", "cancel", *wanted, "--dry-run")["matched"] == 3
    # Nobody is there to agree.
    refused = cli("runs", "cancel", *wanted)
    assert refused.exit_code == 2
    assert "cancel 3 runs?" in refused.stderr
    done = cli_json("runs", "cancel", *wanted, "--yes", "--wait")
    assert (done["output"]["matched"], done["output"]["done"]) == (3, 3)
    assert {cli_json("runs", "show", one)["state"] for one in runs} == {"cancelled"}
    again = cli_json("runs", "rerun", *wanted, "--state", "cancelled", "--yes", "--wait")
    assert again["output"]["done"] == 3
    cli_json("runs", "cancel", *wanted, "--yes", "--wait")


def test_a_cancel_that_waits_exits_by_whether_the_run_was_cancelled(cli, cli_json):
    run = start(cli_json, "sample.wait")
    done = cli("runs", "cancel", run, "--wait", "--json")
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (0, "cancelled")
    assert cli("runs", "cancel", run, "--wait").exit_code == 0
    late = cli("runs", "cancel", start(cli_json, "sample.shout", "--wait"), "--wait")
    assert late.exit_code == 6


def test_many_are_repeated_once_under_a_key(cli, cli_json):
    start(cli_json, "sample.shout", "--wait", "--label", "batch=keyed")
    wanted = ("--all", "--label", "batch=keyed", "--state", "succeeded", "--yes")
    keyed = ("--idempotency-key", "many-1")
    first = cli_json("runs", "rerun", *wanted, *keyed, "--wait")
    again = cli_json("runs", "rerun", *wanted, *keyed, "--wait")
    assert (again["id"], again["output"]["done"]) == (first["id"], 1)
    listed = cli_json("runs", "list", "--label", "batch=keyed")["data"]
    assert len(listed) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("cancel",),
        ("cancel", "some", "--all", "--flow", "x"),
        ("cancel", "some", "--flow", "x"),
        ("rerun", "--all", "--flow", "x", "--from-step", "a:0"),
    ],
)
def test_one_run_or_all_that_fit(words):
    result = run_command("runs", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_young_runs_are_not_pruned(cli, cli_json):
    first = start(cli_json, "sample.shout", "--wait")
    told = cli_json("prune", "--older-than", "7d", "--org", "dev", "--dry-run")
    assert told == {"object": "pruning", "runs": 0, "orgs": {}, "dry_run": True}
    assert "0 runs deleted" in cli("prune", "--older-than", "7d").stdout
    assert cli_json("runs", "show", first)["state"] == "succeeded"


def test_finished_runs_are_pruned_by_age(cli, cli_json):
    waiting = start(cli_json, "sample.wait")
    first = start(cli_json, "sample.shout", "--wait", "--idempotency-key", "pruned")
    counted = cli_json("prune", "--older-than", "0s", "--org", "dev", "--dry-run")
    assert counted["orgs"]["dev"] >= 1
    pruned = cli_json("prune", "--older-than", "0s", "--org", "dev")
    assert pruned["orgs"]["dev"] >= counted["orgs"]["dev"]
    assert cli("runs", "show", first).exit_code == 3
    assert cli_json("runs", "show", waiting)["state"] in ("queued", "running", "waiting")
    # The key went with its run, so that it is free for another.
    assert start(cli_json, "sample.shout", "--idempotency-key", "pruned") != first
    assert cli("runs", "cancel", waiting).exit_code == 0


def test_an_unknown_org_is_not_pruned(cli):
    assert cli("prune", "--older-than", "7d", "--org", "nobody").exit_code == 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("1.5h", 5400)],
)
def test_durations_have_units(text, seconds):
    assert read_duration_s(text, param="--older-than") == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", ""])
def test_a_duration_without_a_unit_is_refused(text):
    with pytest.raises(InvalidInput):
        read_duration_s(text, param="--older-than")
