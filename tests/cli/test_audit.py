"""`millpond audit`: the log is listed, exported and verified, and a change to it ends in an exit code."""

from __future__ import annotations

import json
import time

import pytest

pytestmark = pytest.mark.xdist_group("platform")

DEADLINE_S = 20.0


@pytest.fixture
def log(cli_json):
    """Do something that is told of, and return the log once all of it is sealed."""
    cli_json("pause", "org", "--reason", "to be told of")
    cli_json("resume", "org")
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        rows = cli_json("audit", "list", "--action", "org.")["data"]
        if len(rows) >= 2 and all(row["seal"] for row in rows):
            return rows
    raise AssertionError(f"not sealed in {DEADLINE_S} s: {rows}")


def test_the_log_is_listed(log, cli):
    assert {row["action"] for row in log} == {"org.paused", "org.resumed"}
    shown = cli("audit", "list", "--action", "org.paused")
    assert shown.exit_code == 0
    assert "org.paused" in shown.stdout
    assert "org.resumed" not in shown.stdout


def test_an_untouched_log_verifies(log, cli_json):
    found = {one["log"]: one for one in cli_json("audit", "verify")["data"]}
    assert "(platform)" in found
    org = found["dev"]
    assert org["is_intact"]
    assert org["sealed"] >= 2
    assert org["published_seq"] == org["last_seq"]
    assert cli_json("audit", "verify", "--org", org["log"])["data"][0]["log"] == org["log"]


def test_a_log_whose_published_heads_are_gone_says_so(log, up, cli):
    heads = up.data_dir / "audit-heads" / "org-1.jsonl"  # of the org that `up` makes first
    aside = heads.rename(heads.with_suffix(".aside"))
    try:
        result = cli("audit", "verify")
        allowed = cli("audit", "verify", "--allow-no-heads")
        platform = cli("audit", "verify", "--platform", "--json")
    finally:
        aside.rename(heads)
    assert "no published head was at hand" in " ".join(result.stdout.split())
    assert result.exit_code == 8
    assert allowed.exit_code == 0
    assert platform.exit_code == 0  # has its own heads, or is new
    assert cli("audit", "verify").exit_code == 0


def test_an_unknown_org_is_not_found(up, cli):
    assert cli("audit", "verify", "--org", "nowhere").exit_code == 3


def test_a_cut_tail_ends_in_an_exit_code_that_names_the_place(log, up, cli):
    heads = up.data_dir / "audit-heads" / "org-1.jsonl"  # of the org that `up` makes first
    kept = heads.read_bytes()
    last = json.loads(kept.splitlines()[-1])
    try:
        with heads.open("ab") as file:
            file.write(json.dumps({**last, "seq": last["seq"] + 5}).encode() + b"\n")
        result = cli("audit", "verify")
    finally:
        heads.write_bytes(kept)
    assert result.exit_code == 1
    assert f"tail_cut at seal {last['seq'] + 1}" in " ".join(result.stdout.split())


def test_an_export_verifies_and_a_changed_one_does_not(log, cli, tmp_path):
    path = tmp_path / "log.ndjson"
    assert cli("audit", "export", "--to", str(path)).exit_code == 0
    result = cli("audit", "verify", "--file", str(path))
    assert result.exit_code == 8, result.stdout
    assert cli("audit", "verify", "--file", str(path), "--allow-no-heads").exit_code == 0
    assert "no published head was at hand" in " ".join(result.stdout.split())
    lines = path.read_text().splitlines()
    changed = json.loads(lines[0]) | {"subject": "user:somebody-else"}
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    result = cli("audit", "verify", "--file", str(path), "--allow-no-heads")
    assert result.exit_code == 1
    assert "row_changed at seal 1" in " ".join(result.stdout.split())
    part = tmp_path / "part.ndjson"
    assert cli("audit", "export", "--after", "1", "--to", str(part)).exit_code == 0
    assert cli("audit", "verify", "--file", str(part)).exit_code == 8
    part.write_text("no export\n")
    assert cli("audit", "verify", "--file", str(part)).exit_code == 2


def test_a_table_is_written(log, cli):
    result = cli("audit", "export", "--format", "csv")
    assert result.exit_code == 0
    assert result.stdout.startswith("org,seq,audit_id,")
    assert cli("audit", "export", "--format", "xml").exit_code == 2
