"""Two orgs on a running platform that leave marked words wherever an org can leave data."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import httpx2
from tests.cli.founding import PASSWORD, joined

DEADLINE_S = 60.0


@dataclass
class Marked:
    """An org with its people; `words` are its marks by what they mark, `ids` what it made by the name in paths."""

    animal: str
    client: httpx2.AsyncClient
    words: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, str] = field(default_factory=dict)

    def word(self, what: str) -> str:
        """Return the mark of one kind of thing, made at the first call: in no other place and no other org."""
        if what not in self.words:
            self.words[what] = f"{self.animal}{what}{secrets.token_hex(4)}"
        return self.words[what]

    async def sent(self, method: str, path: str, /, **request: Any) -> Any:
        """Ask for something that has to be done, and return the answer."""
        answer = await self.client.request(method, path, **request)
        assert answer.status_code < 300, f"{method} {path}: {answer.text}"
        return answer.json() if answer.content else None

    async def made(self, name: str, path: str, /, **body: Any) -> str:
        """Make a thing, and note its id under its name in paths."""
        identity = str((await self.sent("POST", path, json=body))["id"])
        self.ids[name].append(identity)
        return identity

    async def started(self, flow: str, /, **body: Any) -> str:
        """Start a run, noted by the name of its flow."""
        run = await self.made("run_id", "/v1/runs", flow=flow, **body)
        self.runs[flow] = run
        return run

    async def until(self, run: str, *states: str) -> None:
        """Wait until a run is in one of some states."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                shown = await self.sent("GET", f"/v1/runs/{run}")
                if shown["state"] in states:
                    return
                assert shown["state"] not in {"succeeded", "failed", "cancelled"}, shown
                await asyncio.sleep(0.1)


def client_of(url: str, token: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {token}"},
        timeout=30.0,
        trust_env=False,
    )


def founded_org(up: Any, operator: str, animal: str) -> Marked:
    """Make an org with an owner whose address, name, and whose org's name and slug are marked."""
    org = Marked(animal, httpx2.AsyncClient())
    email = f"{org.word('owner')}@x.example"
    body = {"slug": org.word("slug"), "name": org.word("orgname"), "owner_email": email}
    headers = {"Authorization": f"Bearer {operator}"}
    made = httpx2.post(f"{up.url}/v1/platform/orgs", json=body, headers=headers, trust_env=False)
    assert made.status_code == 201, made.text
    org.ids["org_id"].append(str(made.json()["id"]))
    org.client = client_of(up.url, joined(up, email))
    return org


async def leave_marks(up: Any, org: Marked, operator_email: str) -> None:
    """Do work of every kind, and leave a marked word in each place."""
    await _people(up, org, operator_email)
    await _knowledge(org)
    await _calendar(org)
    await _runs(up, org)
    await org.sent("POST", "/v1/queues/index/pause", json={"reason": org.word("pause")})


async def _people(up: Any, org: Marked, operator_email: str) -> None:
    word = org.word
    await org.sent("PATCH", "/v1/me", json={"name": word("ownername")})
    role = {"description": word("roletext"), "permissions": ["runs:read"]}
    await org.sent("PUT", f"/v1/roles/{word('role')}", json=role)
    org.ids["name"].append(word("role"))
    member = f"{word('member')}@x.example"
    await org.made("invitation_id", "/v1/invitations", email=member, role="support")
    token = await asyncio.to_thread(joined, up, member)
    async with client_of(up.url, token) as other:
        renamed = await other.patch("/v1/me", json={"name": word("membername")})
        assert renamed.status_code == 200
    guest = f"{word('guest')}@x.example"
    await org.made("invitation_id", "/v1/invitations", email=guest, role="viewer")
    service = await org.made(
        "service_id", "/v1/service-principals", name=word("service"), role="viewer"
    )
    key = {"name": word("key"), "scopes": ["runs:read"], "owner": f"service:{service}"}
    await org.made("key_id", "/v1/api-keys", **key)
    grant = {"operator_email": operator_email, "reason": word("grant"), "hours": 1}
    await org.made("grant_id", "/v1/grants", **grant)
    for one in (await org.sent("GET", "/v1/members"))["data"]:
        org.ids["user_id"].append(one["id"])
    for one in (await org.sent("GET", "/v1/me/sessions"))["data"]:
        org.ids["session_id"].append(one["id"])


async def _knowledge(org: Marked) -> None:
    name = org.word("base")
    org.ids["name"].append(name)
    accepted = await org.sent(
        "POST",
        f"/v1/knowledge-bases/{name}/documents",
        params={"filename": f"{org.word('file')}.md"},
        content=f"# {org.word('heading')}\n\nA kettle is {org.word('document')}.\n".encode(),
    )
    await org.until(accepted["id"], "succeeded")
    org.ids["run_id"].append(accepted["id"])
    found = await org.sent(
        "POST", f"/v1/knowledge-bases/{name}/search", json={"query": "What is a kettle?"}
    )
    assert org.word("document") in json.dumps(found)


async def _calendar(org: Marked) -> None:
    word = org.word
    await org.made(
        "schedule_id",
        "/v1/schedules",
        name=word("schedule"),
        flow="canary.work",
        cron="0 0 1 1 *",
        input={"given": word("scheduled")},
        labels={"place": word("schedulelabel")},
    )
    await org.made(
        "trigger_id",
        "/v1/triggers",
        name=word("trigger"),
        flow="canary.hear",
        event=word("event"),
        labels={"place": word("triggerlabel")},
    )
    data = {"given": word("eventdata"), "output": word("heard")}
    await org.sent(
        "POST", "/v1/events", json={"name": word("event"), "data": data, "id": word("eventid")}
    )


async def _runs(up: Any, org: Marked) -> None:
    word = org.word
    words = {
        "given": word("input"),
        "progress": word("progress"),
        "state": word("state"),
        "output": word("output"),
        "delta": word("delta"),
    }
    labels = {"place": word("runlabel")}
    work = await org.started("canary.work", input=words, labels=labels, dedup_key=word("dedup"))
    failing = await org.started(
        "canary.fail", input={"given": word("error"), "output": word("advice")}
    )
    exploding = await org.started("canary.explode", input={"given": word("unforeseen")})
    open_words = {"progress": word("proposal"), "state": word("title")}
    await org.started("canary.ask", input={"given": "a", **open_words})
    asking = await org.started("canary.ask", input={"given": "b", **open_words})
    listening = await org.started("canary.listen", input={"given": "c", "progress": word("signal")})
    await org.until(work, "succeeded")
    await org.until(failing, "failed")
    await org.until(exploding, "failed")
    await org.until(listening, "waiting")
    said = {"name": word("signal"), "data": word("signaldata")}
    await org.sent("POST", f"/v1/runs/{listening}/signals", json=said)
    await org.until(listening, "succeeded")
    await org.until(asking, "awaiting_input")
    await org.until(org.ids["run_id"][-3], "awaiting_input")
    questions = (await org.sent("GET", "/v1/input-requests"))["data"]
    assert len(questions) == 2
    org.ids["request_id"] += [one["id"] for one in questions]
    (mine,) = [one["id"] for one in questions if one["run_id"] == asking]
    async with await _member(up, org) as member:
        answer = {"answer": {"text": word("answer")}}
        decided = await member.post(f"/v1/input-requests/{mine}/resolve", json=answer)
        assert decided.status_code < 300, decided.text
    await org.until(asking, "succeeded")
    wrong = await org.client.post(
        "/v1/runs", json={"flow": "canary.work", "input": {"given": [word("misfit")]}}
    )
    assert wrong.status_code == 422
    heard = (await org.sent("GET", "/v1/runs", params={"flow": "canary.hear"}))["data"]
    assert len(heard) == 1
    await org.until(heard[0]["id"], "succeeded")
    org.ids["run_id"].append(heard[0]["id"])


async def _member(up: Any, org: Marked) -> httpx2.AsyncClient:
    """Sign in as the member of the org who answers questions."""
    body = {"email": f"{org.word('member')}@x.example", "password": PASSWORD}
    answer = await org.client.post("/v1/auth/sign-in", json=body)
    assert answer.status_code == 200, answer.text
    return client_of(up.url, answer.json()["access_token"])


def found_in(text: str, words: Any) -> list[str]:
    """Return which words stand in a text, whatever their case."""
    lower = text.lower()
    return [word for word in words if word in lower]
