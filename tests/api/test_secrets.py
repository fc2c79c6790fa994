"""Secrets over HTTP: values go in and never come out."""

from __future__ import annotations

import asyncio

from tests.api.conftest import Client, Front

VALUE = "sk_live_0123456789"


async def test_a_secret_is_stored_listed_replaced_and_removed(front: Front, ann: Client) -> None:
    body = {"name": "stripe", "value": VALUE, "description": "live key"}
    made = await ann.post("/v1/secrets", json=body)
    assert made.status_code == 201
    assert made.headers["Location"] == "/v1/secrets/stripe"
    shown = made.json()
    assert (shown["version"], shown["created_by"], shown["used_at"]) == (1, "user:ann", None)
    assert (await ann.post("/v1/secrets", json=body)).json()["code"] == "name_taken"
    replaced = await ann.put("/v1/secrets/stripe", json={"value": "another one"})
    assert replaced.status_code == 200
    assert replaced.json() == {
        **shown,
        "version": 2,
        "changed_at": replaced.json()["changed_at"],
    }
    put = await ann.put("/v1/secrets/other", json={"value": VALUE, "description": "x"})
    assert (put.status_code, put.headers["Location"]) == (201, "/v1/secrets/other")
    page = (await ann.get("/v1/secrets")).json()
    assert [one["name"] for one in page["data"]] == ["other", "stripe"]
    only = (await ann.get("/v1/secrets", params={"name": "stripe"})).json()
    assert [one["name"] for one in only["data"]] == ["stripe"]
    assert (await ann.get("/v1/secrets/stripe")).json()["description"] == "live key"
    assert (await ann.delete("/v1/secrets/stripe")).status_code == 204
    assert (await ann.get("/v1/secrets/stripe")).json()["code"] == "secret_not_found"
    assert (await ann.delete("/v1/secrets/stripe")).status_code == 404


async def test_no_answer_holds_a_value_nor_anything_of_it(front: Front, ann: Client) -> None:
    answers = [
        await ann.post("/v1/secrets", json={"name": "stripe", "value": VALUE}),
        await ann.post("/v1/secrets", json={"name": "stripe", "value": VALUE}),
        await ann.put("/v1/secrets/stripe", json={"value": VALUE}),
        await ann.get("/v1/secrets"),
        await ann.get("/v1/secrets/stripe"),
        await ann.post("/v1/secrets", json={"name": VALUE + "!", "value": 7}),
        await ann.post("/v1/secrets", json={"name": "x", "value": [VALUE]}),
        await ann.post("/v1/secrets", json={"name": "x", "value": VALUE * 10_000}),
        await ann.put("/v1/secrets/x", content=f'{{"value": "{VALUE}'.encode()),
        await ann.get("/v1/audit"),
    ]
    for answer in answers:
        for part in (VALUE, VALUE[-6:], VALUE[:6]):
            assert part not in answer.text.replace(VALUE + "!", ""), answer.text


async def test_values_at_the_edges_are_taken(front: Front, ann: Client) -> None:
    for nth, value in enumerate(["x", "\u0000", "\n", "é" * 65_536, '"\\']):
        answer = await ann.put(f"/v1/secrets/edge-{nth}", json={"value": value})
        assert answer.status_code == 201, answer.text
    assert (await ann.put("/v1/secrets/long", json={"value": "x" * 65_537})).status_code == 422
    assert (await ann.put("/v1/secrets/empty", json={"value": ""})).status_code == 422
    for name in ("Upper", "-dash", "x" * 64, "a b", "a%2Fb"):
        answer = await ann.put(f"/v1/secrets/{name}", json={"value": VALUE})
        assert answer.status_code in (404, 422), name


async def test_many_who_store_one_name_at_once_make_one_secret(front: Front, ann: Client) -> None:
    answers = await asyncio.gather(
        *(ann.put("/v1/secrets/one", json={"value": f"value {nth}"}) for nth in range(12))
    )
    assert sorted(one.status_code for one in answers) == [200] * 11 + [201]
    assert sorted(one.json()["version"] for one in answers) == list(range(1, 13))
    assert len((await ann.get("/v1/secrets")).json()["data"]) == 1
