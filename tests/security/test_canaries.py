"""Canaries: values planted wherever secrets are, in a real platform, and looked for in all that it leaves behind.

Looked at are a dump of the database by `pg_dump` as its superuser, the logs of all processes, every answer of the API
that lists or shows something, and the events of the runs.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from tests.cli.conftest import Up, make_folder, run_command

from millpond.db.server_home import open_home, server_binaries
from millpond.identity.seal import KEY_BYTES

pytestmark = [pytest.mark.xdist_group("platform"), pytest.mark.slow]

CANARY = 'c4nary-of-the/store "Zoë" 7+=7'
KEY = base64.b64encode(bytes(range(KEY_BYTES))).decode()
PASSWORD = "c4nary pass phrase of somebody"
WRONG = "c4nary pass phrase that is wrong"
SMTP_PASSWORD = "c4nary-of-the-mail-server"
MODEL_KEY = "sk-c4nary-of-the-provider"
REPLACED = "c4nary that was replaced by another"
LISTS = ("runs", "secrets", "api-keys", "invitations", "members", "audit", "events", "roles", "grants",
         "service-principals", "input-requests", "flows", "queues", "workers", "schedules", "triggers", "org", "me",
         "audit/export", "audit/verification")  # fmt: skip


def forms(value: str) -> set[str]:
    """Return how a value may stand in a dump, a log or an answer."""
    raw = value.encode()
    once = json.dumps(value)[1:-1]
    found = {value, once, json.dumps(once)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    found |= {quote(value, safe=""), quote(value), raw.hex(), repr(value)[1:-1]}
    for shift in range(3):
        first = -(-8 * shift // 6)
        end = 8 * (shift + len(raw)) // 6
        found.add(base64.b64encode(bytes(shift) + raw).decode()[first:end])
    return found


@dataclass
class Stage:
    """A running platform with what was planted in it, by name."""

    up: Up
    planted: dict[str, str]
    token: str = ""
    answers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, body: Any = None, *, token: str | None = None) -> Any:
        """Ask the API; returns the answer."""
        held = self.token if token is None else token
        headers = {"Authorization": f"Bearer {held}"} if held else {}
        return httpx2.request(
            method,
            f"{self.up.url}/v1/{path}",
            json=body,
            headers=headers,
            timeout=60,
            trust_env=False,
        )

    def look(self, path: str) -> Any:
        """Get something and keep what was answered."""
        answer = self.call("GET", path)
        self.answers[path] = answer.text
        return answer

    def run(self, flow: str, given: Any = None) -> str:
        """Run a flow to its end and keep all that is shown of it."""
        run: str = self.call("POST", "runs", {"flow": flow, "input": given}).json()["id"]
        until = time.monotonic() + 60
        while time.monotonic() < until:
            shown = self.look(f"runs/{run}")
            if shown.json()["state"] in ("succeeded", "failed"):
                self.look(f"runs/{run}/events")
                return str(shown.json()["state"])
            time.sleep(0.1)
        raise AssertionError(f"{flow} does not end: {shown.text}")


class Echo(BaseHTTPRequestHandler):
    """A provider that refuses, and sends back the key that it was sent."""

    keys: list[str]

    def do_POST(self) -> None:
        """Refuse with the key in the words."""
        key = self.headers.get("Authorization", "")
        type(self).keys.append(key)
        words = json.dumps(
            {"error": {"message": f"bad key {key}", "code": key, "type": key}}
        ).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Box:
    """A mail server that keeps the texts of mails and takes one password."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        """Keep a mail."""
        text = envelope.content.decode().replace("=\r\n", "").replace("=3D", "=")
        self.texts.append((envelope.rcpt_tos[0], text))
        return "250 OK"

    def check(
        self, _server: Any, _session: Any, _envelope: Any, _how: str, data: Any
    ) -> AuthResult:
        """Take the right password."""
        return AuthResult(success=data.password == SMTP_PASSWORD.encode())

    def token(self, to: str) -> str:
        """Wait for the newest mail to somebody and return the token of its link."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for address, text in reversed(self.texts):
                if address == to and (found := re.search(r"#token=(\S+)", text)):
                    return found[1]
            time.sleep(0.05)
        raise AssertionError(f"no mail to {to}")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Start a platform, plant canaries in it, let flows give them away; the folder goes after the tests."""
    folder, box = make_folder(), Box()
    Echo.keys = []
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    mail = Controller(
        box,
        "127.0.0.1",
        port,
        authenticator=box.check,
        auth_require_tls=False,
        auth_required=True,
    )
    mail.start()
    up = Up.start(
        folder / "data",
        flows="tests.security.leaky_flows",
        MILLPOND_SECRET_KEY=KEY,
        MILLPOND_SMTP_URL=f"smtp+plain://millpond:{SMTP_PASSWORD}@127.0.0.1:{port}",
        MILLPOND_MAIL_FROM="millpond@x.example",
        MILLPOND_LLM="openai:some-model",
        MILLPOND_LLM_BASE_URL=f"http://127.0.0.1:{provider.server_port}/v1",
        MILLPOND_LLM_API_KEY=MODEL_KEY,
        MILLPOND_LOG_LEVEL="debug",
        MILLPOND_QUEUES="default:10,index:2",
    )
    try:
        made = Stage(up, {})
        plant(made, box)
        give_away(made)
        yield made
    finally:
        up.destroy()
        mail.stop()
        provider.shutdown()
        provider.server_close()
        shutil.rmtree(folder, ignore_errors=True)


def plant(stage: Stage, box: Box) -> None:
    """Put a secret into every place that takes one, as people do."""
    up, planted = stage.up, stage.planted
    place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
    made = json.loads(
        run_command("operator", "link", "--json", MILLPOND_SECRET_KEY=KEY, **place).stdout
    )
    planted["operator link"] = Path(made["file"]).read_text().strip()
    claim = {
        "token": planted["operator link"],
        "email": "op@x.example",
        "name": "",
        "password": PASSWORD,
    }
    assert stage.call("POST", "auth/operator", claim).status_code == 201
    assert sign_in(stage, "op@x.example", WRONG).status_code == 401
    operator = sign_in(stage, "op@x.example", PASSWORD).json()["access_token"]
    body = {"slug": "acme", "name": "Acme", "owner_email": "ann@x.example"}
    assert stage.call("POST", "platform/orgs", body, token=operator).status_code == 201
    planted["invitation"] = box.token("ann@x.example")
    body = {"token": planted["invitation"], "password": PASSWORD}
    assert stage.call("POST", "auth/register/confirm", body).status_code == 201
    joined = sign_in(stage, "ann@x.example", PASSWORD).json()
    body = {"token": planted["invitation"]}
    accepted = stage.call("POST", "auth/invitations/accept", body, token=joined["access_token"])
    assert accepted.status_code == 200, accepted.text
    signed = sign_in(stage, "ann@x.example", PASSWORD).json()
    stage.token = signed["access_token"]
    planted["access token"] = stage.token
    planted["refresh token"] = signed["refresh_token"]
    renewed = stage.call("POST", "auth/refresh", {"refresh_token": joined["refresh_token"]}).json()
    planted["spent refresh token"] = joined["refresh_token"]
    planted["renewed refresh token"] = renewed["refresh_token"]
    stage.call("POST", "auth/password-reset", {"email": "ann@x.example"})
    box.texts.clear()
    stage.call("POST", "auth/password-reset", {"email": "ann@x.example"})
    planted["reset link"] = box.token("ann@x.example")
    body = {"name": "ci", "scopes": ["runs:read"], "expires_in_days": 1}
    key = stage.call("POST", "api-keys", body).json()
    planted["api key"] = key["key"]
    # A spent key is refused with its text in the request alone.
    assert stage.call("DELETE", f"api-keys/{key['id']}").status_code == 204
    assert stage.call("GET", "runs", token=key["key"]).status_code == 401
    stage.call("POST", "invitations", {"email": "bob@x.example", "role": "viewer"})
    planted["waiting invitation"] = box.token("bob@x.example")
    for value in (REPLACED, CANARY):
        stored = stage.call("PUT", "secrets/canary", {"value": value, "description": "a bird"})
        assert stored.status_code in (200, 201), stored.text
        stage.answers[f"put {value}"] = stored.text
    # What is refused is answered without it too.
    for body in (
        {"value": [CANARY]},
        {"value": "", "valeu": CANARY},
        {"value": CANARY, "kind": CANARY},
    ):
        refused = stage.call("PUT", "secrets/canary", body)
        assert refused.status_code == 422
        stage.answers[f"refused {len(stage.answers)}"] = refused.text
    planted["stored secret"] = CANARY
    planted["replaced secret"] = REPLACED
    planted["installation key"] = KEY
    planted["installation key's bytes"] = bytes(range(KEY_BYTES)).hex()
    planted["password"] = PASSWORD
    planted["wrong password"] = WRONG
    planted["mail server's password"] = SMTP_PASSWORD
    planted["provider's key"] = MODEL_KEY
    home = open_home(up.data_dir)
    for role in ("superuser", "owner", "app", "engine"):
        planted[f"database password of {role}"] = home.password(role)


def sign_in(stage: Stage, email: str, password: str) -> Any:
    """Sign somebody in."""
    return stage.call("POST", "auth/sign-in", {"email": email, "password": password}, token="")


def give_away(stage: Stage) -> None:
    """Run what gives the secret away, and look at everything that is shown."""
    assert stage.run("leaky.all") == "succeeded", stage.answers
    assert stage.run("leaky.failing") == "failed"
    assert stage.run("leaky.model") == "failed"
    for path in LISTS:
        assert stage.look(path).status_code == 200, path
    listed = stage.call("GET", "secrets/canary").json()
    assert listed["version"] == 2
    assert listed["used_at"] is not None


def dump(stage: Stage) -> str:
    """Dump the whole database, as a backup does."""
    home = open_home(stage.up.data_dir)
    binaries = server_binaries(home)
    url = f"postgresql://postgres@/millpond?host={quote(str(home.sockets), safe='')}&port=5432"
    done = subprocess.run(
        [str(binaries / "pg_dump"), "--inserts", url],
        env={"PGPASSWORD": home.password("superuser"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def found(stage: Stage, text: str, *, but: tuple[str, ...] = ()) -> list[str]:
    """Return which canaries stand in a text, by their names."""
    return [
        name
        for name, value in stage.planted.items()
        if name not in but and any(form in text for form in forms(value))
    ]


def test_the_flows_gave_it_away_as_they_were_meant_to(stage: Stage) -> None:
    """What is looked for was there to be found: its name stands wherever it would."""
    run = next(
        text
        for path, text in stage.answers.items()
        if '"flow":"leaky.all"' in text and "/events" not in path
    )
    shown = json.loads(run)
    assert shown["state"] == "succeeded"
    assert json.dumps(shown["output"]).count("[secret:canary]") > 20
    assert "[secret:canary]" in json.dumps(shown["state_values"])
    assert {"[secret:canary]"} <= set(shown["state_values"]["shown"])
    assert Echo.keys
    assert all(key == f"Bearer {MODEL_KEY}" for key in Echo.keys)


def test_nothing_planted_is_found_in_a_dump_of_the_database(stage: Stage) -> None:
    text = dump(stage)
    assert "INSERT INTO millpond.secret " in text
    assert "[secret:canary]" in text
    assert found(stage, text) == []


def test_nothing_planted_is_found_in_logs(stage: Stage) -> None:
    logs = {stage.up.log: stage.up.log.read_text()}
    for path in stage.up.data_dir.rglob("*.log"):
        logs[path] = path.read_text(errors="replace")
    assert "leaky.step" in logs[stage.up.log]
    assert "[secret:canary]" in logs[stage.up.log]
    assert {str(path): names for path, text in logs.items() if (names := found(stage, text))} == {}


def test_nothing_planted_is_found_in_answers_and_events(stage: Stage) -> None:
    assert any("secret.opened" in text for text in stage.answers.values())
    assert {
        path: names for path, text in stage.answers.items() if (names := found(stage, text))
    } == {}


@pytest.mark.parametrize(
    "shown",
    [
        'c4nary-of-the/store "Zoë" 7+=7',
        r'{"key": "c4nary-of-the/store \"Zo\u00eb\" 7+=7"}',
        r'{"key": "c4nary-of-the/store \"Zoë\" 7+=7"}',
        r'"\"c4nary-of-the/store \\\"Zo\\u00eb\\\" 7+=7\""',
        "?key=c4nary-of-the%2Fstore%20%22Zo%C3%AB%22%207%2B%3D7&x",
        "/c4nary-of-the/store%20%22Zo%C3%AB%22%207%2B%3D7",
        "63346e6172792d6f662d7468652f73746f726520225a6fc3ab2220372b3d37",
        "Basic YzRuYXJ5LW9mLXRoZS9zdG9yZSAiWm/DqyIgNys9Nw==",
        "Basic dTpjNG5hcnktb2YtdGhlL3N0b3JlICJab8OrIiA3Kz03",
        "Basic dXNlcjpjNG5hcnktb2YtdGhlL3N0b3JlICJab8OrIiA3Kz03",
    ],
)
def test_the_look_finds_what_is_there(stage: Stage, shown: str) -> None:
    """Forms written down by hand, so that looking for the wrong ones would show."""
    assert found(stage, f"before {shown} after") == ["stored secret"]


def test_the_look_finds_all_that_was_planted(stage: Stage) -> None:
    for name, value in stage.planted.items():
        assert name in found(stage, f"before {value} after")
        assert found(stage, value[: len(value) // 2]) == []
