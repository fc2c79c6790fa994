"""Limits from settings and code: read, refused by name, declared at start, audited, shown by where they come from."""

from __future__ import annotations

import json

import orjson
import pytest
from tests.cli import limited_flows

from millpond.cli.config import read_settings
from millpond.cli.limit_settings import declare_code, declare_settings, read_limits
from millpond.engine.hints import Hints
from millpond.errors import InvalidInput


def read(**given):
    return read_limits(read_settings(**given))


def test_limits_stand_in_a_variable_and_in_a_file(tmp_path):
    path = tmp_path / "limits"
    path.write_text(
        "# of the whole platform; these are comments\n"
        "provider:openai concurrency=20\n\n"
        "  provider:openai rate=600/60 burst=10 ; model:* concurrency = 5\n"
    )
    found = read(
        limits="org:* x provider:openai concurrency=5;\nflow:a concurrency=0", limits_file=path
    )
    assert [
        (one.owner, one.key, one.kind, one.maximum, one.period_s, one.burst) for one in found
    ] == [
        (0, "org:*×provider:openai", "concurrency", 5, None, None),
        (0, "flow:a", "concurrency", 0, None, None),
        (0, "provider:openai", "concurrency", 20, None, None),
        (0, "provider:openai", "rate", 600, 60.0, 10),
        (0, "model:*", "concurrency", 5, None, None),
    ]


def test_no_setting_says_nothing_and_an_empty_one_says_none():
    assert read() is None
    assert read(limits="") == []
    assert read(limits=" ;\n# nothing\n") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("provider:openai 5", "'provider:openai 5' is no limit"),
        (
            "model:a concurrency=1; model:b concurrency=many",
            "'model:b concurrency=many' is no limit",
        ),
        ("openai concurrency=5", "'openai concurrency=5': 'openai' is no key of a limit"),
        ("model:a rate=9/0", "'model:a rate=9/0' is no limit"),
        (
            "model:a rate=999999999/1",
            "'model:a rate=999999999/1': maximum 999,999,999 in 1 s is too much",
        ),
        ("model:a concurrency=1; model:a concurrency=2", "a concurrency limit on model:a is there"),
    ],
)
@pytest.mark.parametrize("is_file", [False, True])
def test_a_wrong_entry_is_named_with_its_setting(tmp_path, text, why, is_file):
    path = tmp_path / "limits"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=why) as caught:
        read(limits_file=path) if is_file else read(limits=text)
    assert caught.value.param == ("MILLPOND_LIMITS_FILE" if is_file else "MILLPOND_LIMITS")
    assert caught.value.advice or "is there" in why


def test_tokens_are_read_as_they_are_written():
    (rule,) = read(limits="provider:openai tokens=90000/60") or []
    assert (rule.kind, rule.maximum, rule.period_s, rule.burst) == ("tokens", 90_000, 60.0, 90_000)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="no-such-file cannot be read") as caught:
        read(limits_file=tmp_path / "no-such-file")
    assert caught.value.param == "MILLPOND_LIMITS_FILE"


@pytest.mark.parametrize("command", ["up", "api"])
def test_a_start_with_a_wrong_entry_is_refused(command, urls, invoke, folder):
    result = invoke(
        command,
        "--data-dir",
        str(folder / "data"),
        MILLPOND_PORT="0",
        MILLPOND_DATABASE_URL=urls.app,
        MILLPOND_ENGINE_DATABASE_URL=urls.engine,
        MILLPOND_LIMITS="provider:openai concurrency=a-lot",
    )
    assert result.exit_code == 2
    shown = " ".join(result.stderr.split())
    assert "MILLPOND_LIMITS" in shown
    assert "'provider:openai concurrency=a-lot' is no limit" in shown
    assert "provider:openai concurrency=10" in shown


async def told(db):
    async with db.globals() as con:
        rows = await con.fetch(
            "select subject, action, resource, details from platform_audit"
            " where action like 'limit.%' order by audit_id"
        )
    return [
        (
            row["subject"].partition(":")[0],
            row["action"],
            row["resource"],
            orjson.loads(row["details"]),
        )
        for row in rows
    ]


async def test_changes_are_audited_and_what_stays_is_not(db, urls):
    hints = await Hints.connect(urls.app)
    try:
        await declare_settings(
            db, hints, read(limits="model:a concurrency=1; model:b concurrency=2")
        )
        assert len(await told(db)) == 2
        await declare_settings(db, hints, read(limits="model:b concurrency=2; model:c rate=6/60"))
        await declare_settings(db, hints, None)
        # Rows of one transaction have no order.
        rows = sorted((await told(db))[2:], key=lambda one: one[1])
        assert [one[:3] for one in rows] == [
            ("settings", "limit.removed", "limit:concurrency model:a"),
            ("settings", "limit.set", "limit:rate model:c"),
        ]
        assert rows[1][3] == {
            "source": "settings",
            "overridden_by": None,
            "maximum": 6,
            "period_s": 60.0,
            "burst": 1,
        }
        await declare_code(db, hints, [limited_flows.answer, limited_flows.route])
        rows = (await told(db))[4:]
        assert {one[2] for one in rows} == {
            "limit:concurrency flow:limited.answer",
            "limit:concurrency provider:openai",
            "limit:rate provider:openai",
        }
        assert {one[0] for one in rows} == {"code"}
        await declare_code(db, hints, [limited_flows.answer, limited_flows.route])
        assert len(await told(db)) == 4 + len(rows)
    finally:
        await hints.close()


@pytest.mark.slow
@pytest.mark.xdist_group("platform")
def test_a_platform_shows_where_its_limits_come_from(started, invoke):
    flows = "tests.cli.limited_flows"
    up = started(
        flows=flows, MILLPOND_LIMITS="provider:openai concurrency=15; model:* concurrency=4"
    )

    def ask(*arguments, of=up):
        place = {"MILLPOND_URL": of.url, "MILLPOND_DATA_DIR": str(of.data_dir)}
        return invoke("limits", *arguments, **place)

    def listed(of=up):
        page = json.loads(ask("list", "--everyone", "--json", of=of).stdout)
        return {one["id"]: one for one in page["data"]}

    found = listed()
    assert {name: one["source"] for name, one in found.items()} == {
        "concurrency flow:limited.answer": "code",
        "concurrency model:*": "settings",
        "concurrency provider:openai": "settings",
        "rate provider:openai": "code",
    }
    assert found["concurrency flow:limited.answer"]["set_by"] == "code:limited.answer@1"
    assert found["concurrency model:*"]["set_by"].startswith("settings:")
    below = found["concurrency provider:openai"]["overrides"]
    assert [(one["source"], one["maximum"]) for one in below] == [("code", 20), ("code", 20)]
    assert ask("set", "model:*", "--concurrency", "6", "--everyone").exit_code == 0
    shown = ask("list", "--everyone").stdout
    assert "api (above settings: 4 at once)" in " ".join(shown.split())
    of_org = json.loads(ask("list", "--json").stdout)["data"]
    assert {(one["source"], one["set_by"]) for one in of_org} == {
        ("api", "operator"),
        ("settings", "settings"),
        ("code", "code"),
    }
    assert all(one["overrides"] == [] for one in of_org)
    assert up.stop() == 0

    again = started(flows=flows)
    found = listed(again)
    assert {name: (one["source"], one["maximum"]) for name, one in found.items()} == {
        "concurrency flow:limited.answer": ("code", 5),
        "concurrency model:*": ("api", 6),
        "concurrency provider:openai": ("code", 20),
        "rate provider:openai": ("code", 600),
    }
    assert found["concurrency model:*"]["overrides"] == []
    assert again.stop() == 0
