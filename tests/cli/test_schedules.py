"""Schedules by command, against a real server."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("platform")


def test_a_schedule_lives_by_its_commands(cli, cli_json):
    made = cli_json(
        "schedules", "create", "hourly", "sample.shout", "--cron", "@hourly",
        "--time-zone", "Europe/Berlin", "-i", '{"word": "tick"}', "--missed", "all",
        "--overlap", "skip", "--label", "team=ops",
    )  # fmt: skip
    assert (made["missed"], made["overlap"], made["labels"]) == ("all", "skip", {"team": "ops"})
    assert "hourly" in cli("schedules", "list").stdout
    shown = cli_json("schedules", "show", "hourly")
    assert (shown["id"], len(shown["next_times"])) == (made["id"], 5)
    assert cli_json("schedules", "pause", "hourly")["next_due_at"] is None
    assert cli_json("schedules", "resume", made["id"])["next_due_at"] == made["next_due_at"]
    started = cli_json("schedules", "run", "hourly")
    tail = cli("runs", "tail", started["id"])
    assert tail.exit_code == 0
    assert cli_json("schedules", "show", "hourly")["last_run"]["output"] == {"word": "TICK"}
    assert cli_json("schedules", "delete", "hourly")["deleted"] is True
    assert cli("schedules", "show", "hourly").exit_code == 3


def test_a_schedule_that_could_not_run_is_refused_with_advice(cli):
    result = cli("schedules", "create", "bad", "sample.shout", "--cron", "0 25 * * *")
    assert result.exit_code != 0
    assert "0-23" in result.stderr
    assert "advice" in result.stderr


def test_tables_tell_when_a_schedule_is_next_due(cli):
    result = cli("schedules", "create", "daily", "sample.shout", "--cron", "@daily", "--paused")
    assert "paused" in result.stdout
    assert "@daily" in cli("schedules", "list").stdout
    assert "daily" in cli("schedules", "resume", "daily").stdout
    assert "last_error" in cli("schedules", "show", "daily").stdout
    assert "gone" in cli("schedules", "delete", "daily").stdout
