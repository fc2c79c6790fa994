"""`millpond limits simulate`: what it reads of its options, and what it makes of recorded runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from millpond.cli import limit_replay
from millpond.cli.replayed import (
    Recording,
    changed,
    compare,
    read_remove,
    read_set,
    read_since,
    spills_of,
)
from millpond.cli.spills import SpillTexts
from millpond.engine.rules import Rule
from millpond.engine.spilling import Spill
from millpond.errors import InvalidInput

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def _run(
    at_s: float,
    worked_s: float,
    flow: str = "answer",
    *keys: str,
    org: str | None = None,
    tokens: int | None = None,
    used: int | None = None,
    is_lost: bool = False,
    urgency: str = "standard",
) -> dict[str, Any]:
    ready_at = BEGAN + timedelta(seconds=at_s)
    return {
        "id": f"{at_s}",
        "org": org,
        "flow": flow,
        "version": 1,
        "queue": "default",
        "keys": list(keys),
        "tokens": tokens,
        "used": None
        if used is None
        else [{"keys": [key for key in keys if ":" in key], "tokens": used, "is_lost": is_lost}],
        "priority": 0,
        "urgency": urgency,
        "ready_at": ready_at.isoformat(),
        "started_at": (ready_at + timedelta(seconds=7)).isoformat(),
        "worked_s": worked_s,
    }


def _recording(runs: list[dict[str, Any]], after: list[Rule], **more: Any) -> Recording:
    given: dict[str, Any] = {
        "workers": [{"default": 10}],
        "before": [],
        "is_cut": False,
        "orgs": {None: 1},
    }
    return Recording(runs=runs, after=after, **(given | more))


def test_limits_are_read_as_they_are_written():
    assert read_set("org:acme concurrency=10") == Rule(
        owner=1, key="org:acme", kind="concurrency", maximum=10
    )
    assert read_set("provider:openai x model:mini rate=600/60 burst=10") == Rule(
        owner=1, key="model:mini×provider:openai", kind="rate", maximum=600, period_s=60.0, burst=10
    )
    assert read_set("provider:openai tokens=90000/60") == Rule(
        owner=1,
        key="provider:openai",
        kind="tokens",
        maximum=90_000,
        period_s=60.0,
        burst=90_000,
    )
    assert read_remove("model:mini rate") == ("model:mini", "rate")
    assert read_remove("model:mini tokens") == ("model:mini", "tokens")
    assert read_since("24h") == timedelta(hours=24)
    assert read_since("7d") == timedelta(days=7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model:m",
        "model:m concurrency",
        "model:m concurrency=-1",
        "model:m rate=5",
        "model:m rate=5/0",
        "m concurrency=1",
        "model:m tokens=4",
    ],
)
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(InvalidInput):
        read_set(text)


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "-1h", "1y", "24 hours"])
def test_what_is_no_span_is_refused(text):
    with pytest.raises(InvalidInput):
        read_since(text)


def test_own_limits_are_replaced_and_removed_and_those_of_the_platform_stay():
    mine = Rule(owner=1, key="model:m", kind="concurrency", maximum=5)
    shared = Rule(owner=0, key="model:m", kind="concurrency", maximum=9)
    new = read_set("model:m concurrency=2")
    assert changed([mine, shared], [new], []) == [shared, new]
    assert changed([mine, shared], [], [("model:m", "concurrency")]) == [shared]
    with pytest.raises(InvalidInput):
        changed([shared], [], [("model:m", "concurrency")])


def test_a_lower_limit_makes_runs_with_its_key_wait_and_no_others():
    runs = [_run(0.1 * nth, 1.0, "answer", "model:m") for nth in range(20)]
    runs += [_run(0.1 * nth, 0.1, "look") for nth in range(20)]
    report = compare(_recording(runs[::-1], [read_set("model:m concurrency=1")]))
    waits = {one["flow"]: one for one in report["waits"]}
    assert set(waits) == {None, "answer", "look"}
    # Twenty seconds of work, one at a time: the last one begins 19 s after the first, 1.9 s after which it came.
    assert waits["answer"]["after"]["max_s"] == pytest.approx(19 - 1.9, abs=0.1)
    assert waits["answer"]["before"]["max_s"] < 1.5
    assert waits["look"]["after"]["max_s"] < 0.1
    assert waits["answer"]["recorded"]["p50_s"] == pytest.approx(7.0)
    assert waits[None]["recorded"]["runs"] == 40
    (limit,) = report["limits"]
    assert (limit["key"], limit["is_of_platform"], limit["before"]) == ("model:m", False, None)
    assert limit["after"]["most_in_use"] == 1
    assert limit["after"]["full_share"] > 0.95


def test_a_limit_on_tokens_lets_each_go_when_there_are_as_many_as_it_needs():
    # 300 a second and 600 at once: 20 runs of 300 and 20 of 100 that come at once are over after (8000 - 600) / 300 s.
    runs = [_run(0.0, 0.01, "large", "model:m", tokens=300) for nth in range(20)]
    runs += [_run(0.0, 0.01, "small", "model:m", tokens=100) for _ in range(20)]
    report = compare(_recording(runs, [read_set("model:m tokens=300/1 burst=600")]))
    waits = {one["flow"]: one for one in report["waits"]}
    assert waits[None]["after"]["max_s"] == pytest.approx(7400 / 300, abs=0.3)
    assert waits[None]["after"]["never"] == 0
    assert waits[None]["before"]["max_s"] < 0.2
    # What declares nothing needs a thousand, which is no more than all that there is.
    plain = compare(
        _recording(
            [_run(0.0, 0.01, "answer", "model:m") for _ in range(3)],
            [read_set("model:m tokens=300/1 burst=600")],
        )
    )
    assert plain["waits"][0]["after"]["max_s"] == pytest.approx(4.0, abs=0.2)
    # What needs more than there ever are waits for ever.
    never = compare(
        _recording(
            [
                _run(0.0, 0.01, "answer", "model:m", tokens=700),
                _run(0.0, 0.01, "b", "model:m", tokens=1),
            ],
            [read_set("model:m tokens=300/1 burst=600")],
        )
    )
    assert never["waits"][0]["after"]["never"] == 1


# A token in a hundred seconds, so that only what runs give back, or owe, changes what there is.
def _tokens(burst: int) -> list[Rule]:
    return [read_set(f"model:m tokens=1/100 burst={burst}")]


def _starts(runs: list[dict[str, Any]], limits: list[Rule]) -> tuple[float, float]:
    """Return the waits of the middle run and of the last."""
    after = compare(_recording(runs, limits))["waits"][0]["after"]
    return after["p50_s"], after["max_s"]


def test_what_runs_did_not_use_comes_back_as_they_end():
    # Six declare 500 of 1,000, and go two by two; of 100 that each uses all go in the end, of 500 only the first two.
    runs = [_run(0.0, 1.0, "answer", "model:m", tokens=500, used=100) for _ in range(6)]
    assert _starts(runs, _tokens(1000))[1] < 6
    declared = [_run(0.0, 1.0, "answer", "model:m", tokens=500) for _ in range(6)]
    assert _starts(declared, _tokens(1000))[1] > 10_000
    # What was cut off may have used all that it had reserved.
    cut = [
        _run(0.0, 1.0, "answer", "model:m", tokens=500, used=100, is_lost=True) for _ in range(6)
    ]
    assert _starts(cut, _tokens(1000))[1] > 10_000


def test_what_runs_used_beyond_their_estimate_is_owed():
    runs = [_run(0.0, 1.0, "answer", "model:m", tokens=100, used=300)]
    runs += [_run(2.0, 1.0, "answer", "model:m", tokens=100, used=100) for _ in range(2)]
    # Of 200 the first has 100 and uses 300: the next goes when 200 have come, the last when 300 have.
    limits = [read_set("model:m tokens=10/1 burst=200")]
    middle_s, last_s = _starts(runs, limits)
    assert middle_s == pytest.approx(20 - 2, abs=0.2)
    assert last_s == pytest.approx(30 - 2, abs=0.2)
    plain = [run | {"used": None} for run in runs]
    assert _starts(plain, limits)[1] < 9


def test_what_declares_nothing_is_learned_from_what_was_used():
    # A thousand is taken for the first two; then it is known that each uses ten.
    runs = [_run(0.0, 1.0, "answer", "model:m", used=10)]
    runs += [_run(3.0 + 0.01 * nth, 1.0, "answer", "model:m", used=10) for nth in range(8)]
    assert _starts(runs, _tokens(1000))[1] < 0.1


def test_use_counts_under_the_model_that_was_asked():
    runs = [_run(0.0, 1.0, "answer", "model:m", "model:n", tokens=500, used=0) for _ in range(4)]
    for run in runs:
        run["used"] = [{"keys": ["model:n"], "tokens": 5000, "is_lost": False}]
    assert _starts(runs, _tokens(1000))[1] < 6
    assert _starts(runs, [read_set("model:n tokens=1/100 burst=1000")])[1] > 10_000


def test_what_a_step_used_of_its_own_provider_counts_under_no_other_one():
    """But under limits on anything else that its run has."""
    keys = "customer:x", "provider:openai"
    runs = [_run(0.0, 1.0, "answer", *keys, tokens=500, used=0) for _ in range(4)]
    for run in runs:
        run["used"] = [{"keys": ["model:", "provider:"], "tokens": 5000, "is_lost": False}]
    assert _starts(runs, [read_set("provider:openai tokens=1/100 burst=1000")])[1] < 6
    assert _starts(runs, [read_set("customer:x tokens=1/100 burst=1000")])[1] > 10_000


def test_interactive_runs_go_first_by_the_lead_and_not_without_one():
    runs = [_run(0.0, 5.0, "index") for _ in range(40)]
    runs += [_run(1.0, 1.0, "answer", urgency="interactive") for _ in range(3)]
    workers = [{"default": 2}]
    led = {one["flow"]: one for one in compare(_recording(runs, [], workers=workers))["waits"]}
    assert led["answer"]["after"]["max_s"] < 12
    asked = _recording(runs, [], workers=workers, lead_s=0.0)
    plain = {one["flow"]: one for one in compare(asked)["waits"]}
    assert plain["answer"]["after"]["p50_s"] > 80


def test_removing_a_limit_lets_runs_go_sooner():
    runs = [_run(0.0, 1.0, "answer", "model:m") for _ in range(10)]
    before = [read_set("model:m concurrency=2")]
    report = compare(_recording(runs, [], before=before))
    assert report["waits"][0]["before"]["max_s"] == pytest.approx(4.0, abs=0.1)
    assert report["waits"][0]["after"]["max_s"] == 0.0


def test_a_closed_limit_is_told_of_as_never():
    report = compare(_recording([_run(0.0, 1.0)], [read_set("flow:answer concurrency=0")]))
    assert report["waits"][0]["after"]["never"] == 1
    assert limit_replay._wait(report["waits"][0]["after"]).endswith("1 never")


def test_a_queue_that_nobody_serves_needs_slots():
    with pytest.raises(InvalidInput, match="queue default"):
        compare(_recording([_run(0.0, 1.0)], [], workers=[{"llm": 1}]))


def test_a_limit_of_the_platform_that_names_an_org_holds_for_that_org_alone():
    runs = [_run(0.0, 1.0, org=org) for org in ("acme", "bolt") for _ in range(5)]
    orgs: dict[str | None, int] = {"acme": 1, "bolt": 2}
    rule = limit_replay._of_org(read_set("org:bolt concurrency=1", 0), orgs)
    report = compare(_recording(runs, [rule], orgs=orgs))
    waits = {one["org"]: one for one in report["waits"]}
    assert waits["acme"]["after"]["max_s"] == 0.0
    assert waits["bolt"]["after"]["max_s"] == pytest.approx(4.0, abs=0.1)
    assert waits[None]["before"]["max_s"] == 0.0
    assert [(one["org"], one["key"]) for one in report["limits"]] == [("bolt", "")]


def test_orgs_share_what_a_limit_of_the_platform_lets_through():
    """One org sends ten times as much; the other does not wait for it."""
    runs = [_run(0.0, 1.0, "answer", "model:m", org="acme") for _ in range(50)]
    runs += [_run(1.0, 1.0, "answer", "model:m", org="bolt") for _ in range(5)]
    orgs: dict[str | None, int] = {"acme": 1, "bolt": 2}
    report = compare(_recording(runs, [read_set("model:m concurrency=2", 0)], orgs=orgs))
    waits = {one["org"]: one for one in report["waits"]}
    assert waits["acme"]["after"]["max_s"] > 20
    assert waits["bolt"]["after"]["max_s"] < 7


SURGE = [_run(0.0, 10.0) | {"queue": "llm"} for _ in range(12)]
TWO = [{"default": 4, "llm": 1}, {"default": 4, "llm": 1}]


def test_a_replay_helps_among_queues_as_each_live_worker_says() -> None:
    told: list[Any] = [
        {"helps": {"default": ["llm"]}, "keep": {}, "reserve": {}},
        {"helps": {"default": ["llm"]}, "keep": {"default": 2}, "reserve": {}},
    ]
    spills = spills_of(SpillTexts(), TWO, told)
    alone = compare(_recording(SURGE, [], workers=TWO))
    helped = compare(_recording(SURGE, [], workers=TWO, spills=spills))
    assert alone["waits"][0]["before"]["max_s"] == pytest.approx(50, abs=0.5)
    # Of ten slots two are kept: eight go at once, the other four as these end.
    assert helped["waits"][0]["before"]["max_s"] == pytest.approx(10, abs=0.5)
    assert helped["spills"] == ["default helps llm", "default keeps 2 when it helps"]
    assert alone["spills"] == []


def test_a_replay_with_other_help_than_the_live_workers_give() -> None:
    told: list[Any] = [{"helps": {}, "keep": {}, "reserve": {}}] * 2
    spills = spills_of(SpillTexts(spill="default:llm", reserve="default:1"), TWO, told)
    assert spills == [Spill(helps={"default": ["llm"]}, reserve={"default": 1})] * 2
    helped = compare(_recording(SURGE, [], workers=TWO, spills=spills))
    assert helped["waits"][0]["before"]["max_s"] == pytest.approx(10, abs=0.5)
    assert spills_of(SpillTexts(), TWO) == [Spill()] * 2


def test_a_queue_that_is_only_helped_needs_no_slots() -> None:
    workers = [{"default": 4}]
    spills = spills_of(SpillTexts(spill="default:llm"), workers)
    report = compare(_recording(SURGE, [], workers=workers, spills=spills))
    assert report["waits"][0]["before"]["never"] == 0


@pytest.mark.parametrize(
    ("texts", "param"),
    [
        (SpillTexts(spill="default"), "--spill"),
        (SpillTexts(spill="sql:llm"), "--spill"),
        (SpillTexts(spill="default:llm", keep="default:4"), "--spill-keep"),
        (SpillTexts(reserve="llm:1"), "--reserve"),
    ],
)
def test_help_that_no_worker_could_give_is_refused(texts: SpillTexts, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spills_of(texts, TWO)
    assert caught.value.param == param
