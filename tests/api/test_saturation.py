"""How full things are, over HTTP, of an org and of all for operators; and when a run is expected to start."""

from __future__ import annotations

from typing import Any

import pytest
from tests.security.conftest import World, world

from .conftest import Client, Front

__all__ = ["world"]

PATH = "/v1/platform/limits/saturation"


async def start(client: Client, **body: Any) -> str:
    answer = await client.post("/v1/runs", json={"flow": "echo", **body})
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["id"]
    return run_id


async def test_operators_see_how_much_there_is_of_all_orgs_page_by_page(world: World) -> None:
    await world.front.publish("echo")
    operator = await world.client(await world.person(is_operator=True))
    for org_id in (world.org_id, world.other_id):
        await start(await world.owner_of(org_id), keys=["model:secret"])
    whole = (await operator.get(PATH, params={"starved_after_s": 0})).json()
    slugs = sorted([world.slugs[world.org_id], world.slugs[world.other_id]])
    assert [one["id"] for one in whole["data"]] == [
        "queue default",
        *(f"org {slug}" for slug in slugs),
    ]
    queue, org, _ = whole["data"]
    assert (queue["waiting"], queue["orgs"], queue["is_starved"]) == (2, 2, True)
    assert (org["waiting"], org["in_use"], org["maximum"]) == (1, 0, None)
    assert "secret" not in str(whole)
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 1}
    while True:
        page = (await operator.get(PATH, params=params)).json()
        seen += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    assert seen == [one["id"] for one in whole["data"]]
    only = (await operator.get(PATH, params={"of": "org"})).json()["data"]
    assert [one["name"] for one in only] == slugs
    assert not any(one["is_starved"] for one in only)


@pytest.mark.parametrize(
    "params",
    [
        {"of": "lane"},
        {"after": "lane x"},
        {"after": "org"},
        {"limit": 201},
        {"starved_after_s": -1},
    ],
)
async def test_what_no_page_has_is_refused(world: World, params: dict[str, Any]) -> None:
    operator = await world.client(await world.person(is_operator=True))
    assert (await operator.get(PATH, params=params)).status_code == 422


async def test_people_of_an_org_see_nothing_of_all(world: World) -> None:
    owner = await world.owner_of(world.org_id)
    assert (await owner.get(PATH)).status_code == 403


async def test_a_run_tells_its_place_and_when_it_is_expected(front: Front, ann: Client) -> None:
    await front.publish("echo")
    run_id = await start(ann)
    why = (await ann.get(f"/v1/runs/{run_id}/why")).json()
    assert why["estimate"]["basis"] == "no_worker"
    assert why["estimate"]["in_s"] is None
    assert why["estimate"]["text"] == "When is not known: no worker could take it."
    async with front.engine_db.duty("test") as con:
        await con.execute(
            "insert into worker (worker_id, host, pid, queues, capabilities, expires_at, in_use, told, release, labels)"
            " values (gen_random_uuid(), 'mill', 1, '{\"default\": 1}', array['echo@1'],"
            " clock_timestamp() + interval '1 hour', '{\"default\": 1}', '{\"took_s\": {\"echo@1\": 90}}', '', '{}')"
        )
    second = await start(ann)
    why = (await ann.get(f"/v1/runs/{second}/why")).json()
    (reason,) = why["reasons"]
    assert (reason["ahead_of_org"], reason["ahead_of_all"], reason["is_order_exact"]) == (
        1,
        1,
        True,
    )
    assert why["estimate"] == {
        "in_s": 135.0,
        "is_least": False,
        "basis": "slots",
        "text": "Expected in about 2 min: 1 before it, 1 slot, 90 s for each as workers tell.",
    }
