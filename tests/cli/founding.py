"""People on a running platform: the first operator, and whoever is invited by mail."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx2

PASSWORD = "a pass phrase of the test"


def mailed(up, to, after=""):
    """Wait for the newest mail to an address and return the token of its link."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        path = up.data_dir / "mail.txt"
        text = path.read_text() if path.exists() else ""
        mails = [mail for mail in text.split("From: ") if f"To: {to}" in mail]
        tokens = re.findall(r"#token=3?D?(\S+)", mails[-1].replace("=\n", "")) if mails else []
        if tokens and tokens[-1] != after:
            return tokens[-1]
        time.sleep(0.1)
    raise AssertionError(f"no mail to {to}")


def signed_in(up, email):
    answer = httpx2.post(
        f"{up.url}/v1/auth/sign-in", json={"email": email, "password": PASSWORD}, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def joined(up, email, after=""):
    """Make the account of an invitation, sign in, accept, and sign in for the new place.

    Somebody with an account has had an invitation before: its token is `after`.
    """
    token = mailed(up, email, after)
    if not after:
        body = {"token": token, "password": PASSWORD}
        made = httpx2.post(f"{up.url}/v1/auth/register/confirm", json=body, trust_env=False)
        assert made.status_code == 201, made.text
    headers = {"Authorization": f"Bearer {signed_in(up, email)}"}
    accepted = httpx2.post(
        f"{up.url}/v1/auth/invitations/accept",
        json={"token": token},
        headers=headers,
        trust_env=False,
    )
    assert accepted.status_code == 200, accepted.text
    return signed_in(up, email)


def found(up, run_command):
    """Make the first operator, the org acme, and its owner; returns the tokens of both people."""
    place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
    made = json.loads(run_command("operator", "link", "--json", **place).stdout)
    token = Path(made["file"]).read_text().strip()
    assert Path(made["file"]).stat().st_mode & 0o077 == 0
    claim = ("operator", "claim", "op@pond.example", "--token", token, "--password-stdin")
    assert run_command(*claim, stdin=f"{PASSWORD}\n", **place).exit_code == 0
    assert run_command(*claim, stdin=f"{PASSWORD}\n", **place).exit_code != 0
    operator = signed_in(up, "op@pond.example")
    create = ("orgs", "create", "acme", "Acme", "--owner", "ann@acme.example")
    assert run_command(*create, "--token", operator, **place).exit_code == 0
    return operator, joined(up, "ann@acme.example")
