"""Limits on tokens over HTTP: set with a default burst, needs of flows and runs, what never fits, why a run waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.api.test_limits import listed, put, reasons

from .conftest import Client, Front, until


async def test_tokens_are_set_with_a_periods_worth_at_once_and_removed(
    front: Front, ann: Client
) -> None:
    made = await put(ann, key="provider:x", kind="tokens", maximum=90_000, period_s=60.0)
    assert (made["id"], made["burst"]) == ("tokens provider:x", 90_000)
    less = await put(ann, key="provider:x", kind="tokens", maximum=90_000, period_s=60.0, burst=500)
    assert less["burst"] == 500
    assert list(await listed(ann)) == ["tokens provider:x"]
    params = {"key": "provider:x", "kind": "tokens"}
    assert (await ann.delete("/v1/limits", params=params)).status_code == 204
    assert await listed(ann) == {}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"key": "model:m", "maximum": 1, "kind": "tokens"}, "period_s"),
        ({"key": "tokens:5", "maximum": 1}, "key"),
        (
            {"key": "model:m", "maximum": 1, "kind": "tokens", "period_s": 2.6e6, "burst": 10**9},
            "burst",
        ),
    ],
)
async def test_what_does_not_fit_is_refused_by_its_field(
    front: Front, ann: Client, body: dict[str, Any], param: str
) -> None:
    refused = await ann.put("/v1/limits", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)


async def test_a_run_needs_what_its_flow_declares_or_what_is_said_as_it_starts(
    front: Front, ann: Client
) -> None:
    async def asks(_ctx: Any, _: Any) -> None:
        await asyncio.sleep(0)

    front.flow(asks, keys=["provider:x"], tokens=2345)
    async with front.worker():
        flow = (await ann.get("/v1/flows/asks")).json()
        assert (flow["keys"], flow["tokens"]) == (["provider:x"], 2400)
        await put(ann, key="provider:x", kind="tokens", maximum=2000, period_s=60.0)
        refused = await ann.post("/v1/runs", json={"flow": "asks"})
        assert refused.status_code == 422, refused.text
        problem = refused.json()
        assert (problem["code"], problem["error"]["param"]) == ("tokens_above_limit", "tokens")
        assert (
            "asks needs 2,400 tokens, and provider:x never has more than 2,000" in problem["detail"]
        )
        some = await ann.post(
            "/v1/runs/batch", json={"runs": [{"flow": "asks", "tokens": 10}, {"flow": "asks"}]}
        )
        assert some.status_code == 422
        assert some.json()["errors"][0]["param"] == "runs[1].tokens"
        fits = await ann.post("/v1/runs", json={"flow": "asks", "tokens": 2000})
        assert fits.status_code == 202, fits.text
        assert (await front.ended(ann, fits.json()["id"]))["state"] == "succeeded"
        keyed = await ann.post("/v1/runs", json={"flow": "asks", "keys": ["tokens:5"]})
        assert (keyed.status_code, keyed.json()["error"]["param"]) == (422, "keys")


async def test_why_tells_how_many_tokens_are_missing(front: Front, ann: Client) -> None:
    may_end = asyncio.Event()

    async def asks(_ctx: Any, _: Any) -> None:
        await may_end.wait()

    front.flow(asks, keys=["provider:x"], tokens=700)
    await put(ann, key="provider:x", kind="tokens", maximum=1000, period_s=86_400.0)
    async with front.worker():
        first = (await ann.post("/v1/runs", json={"flow": "asks"})).json()["id"]
        await until(ann, first, "run.started")
        second = (await ann.post("/v1/runs", json={"flow": "asks"})).json()["id"]
        async with asyncio.timeout(20):
            while "limit" not in (why := await reasons(ann, second)):
                await asyncio.sleep(0.02)
        full = why["limit"]
        assert (full["limit"], full["tokens"], full["left"], full["maximum"]) == (
            "tokens",
            700,
            300,
            1000,
        )
        assert full["until"] is not None
        assert "provider:x has too few tokens: needs 700, 300 left, the next at" in full["text"]
        page = (await ann.get("/v1/limits/saturation")).json()
        row = {one["id"]: one for one in page["data"]}["limit own tokens provider:x provider:x"]
        assert (row["kind"], row["in_use"], row["own"]) == ("tokens", None, 1)
        may_end.set()
        # Nothing was used, so that all of it comes back.
        assert (await front.ended(ann, second))["state"] == "succeeded"
