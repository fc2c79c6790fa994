"""Triggers and events by command, against a real server."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("platform")

FILTER = '{"required": ["word"]}'


def test_an_event_starts_a_flow_by_its_trigger(cli, cli_json):
    made = cli_json(
        "triggers", "create", "hear", "word.said", "sample.hear", "--filter", FILTER,
        "--label", "team=ops",
    )  # fmt: skip
    assert (made["mode"], made["filter"]) == ("each", {"required": ["word"]})
    assert cli_json("events", "send", "word.said", "--data", "{}")["runs"] == []
    sent = cli_json("events", "send", "word.said", "-d", '{"word": "hi"}', "--id", "w1")
    again = cli_json("events", "send", "word.said", "-d", '{"word": "hi"}', "--id", "w1")
    assert again == sent
    (started,) = sent["runs"]
    assert cli("runs", "tail", started["run_id"]).exit_code == 0
    assert cli_json("runs", "show", started["run_id"])["output"] == {"word": "hi"}
    listed = cli_json("events", "list", "--name", "word.said", "--limit", "1")
    assert (listed["data"][0]["id"], listed["has_more"]) == ("w1", True)
    assert started["run_id"] in cli("events", "list").stdout
    assert "word.said" in cli("triggers", "list").stdout
    assert cli_json("triggers", "pause", "hear")["is_paused"] is True
    assert "paused" in cli("triggers", "list").stdout
    assert "word.said" in cli("triggers", "resume", "hear").stdout
    assert cli_json("triggers", "show", "hear")["id"] == made["id"]
    assert "waiting" in cli("triggers", "show", "hear").stdout
    assert "gone" in cli("triggers", "delete", "hear").stdout
    assert cli("triggers", "show", "hear").exit_code == 3


def test_gathering_is_set_by_options(cli_json, cli):
    made = cli_json(
        "triggers", "create", "calm", "word.said", "sample.hear", "--mode", "debounce",
        "--period", "2.5", "--max-wait", "60", "--group-by", "word",
    )  # fmt: skip
    assert (made["period_s"], made["max_wait_s"], made["group_by"]) == (2.5, 60, "word")
    assert "received" in cli("events", "send", "other.thing").stdout
    assert cli_json("triggers", "delete", "calm")["deleted"] is True


def test_a_trigger_without_what_its_mode_needs_is_refused_by_name(cli):
    result = cli("triggers", "create", "bad", "word.said", "sample.hear", "--mode", "batch")
    assert result.exit_code == 2
    assert "max_wait_s" in result.stderr
