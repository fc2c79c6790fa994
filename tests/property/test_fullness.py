"""Properties of what a look adds: never more than the time that passed, and only where something is full."""

from __future__ import annotations

import orjson
from hypothesis import given
from hypothesis import strategies as st

from millpond.engine.fullness import Before, QueueSeen, kept, of_orgs, of_queues, of_rooms

counts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 100))
queues = st.lists(
    st.builds(
        QueueSeen,
        name=st.sampled_from(["default", "llm", "sql"]),
        slots=st.integers(0, 3),
        in_use=st.integers(0, 4),
        waits=st.booleans(),
        went=counts,
    ),
    max_size=3,
    unique_by=lambda one: one.name,
)


@given(queues, queues, st.floats(0, 2))
def test_a_queue_is_full_where_work_waits_for_its_slots(
    first: list[QueueSeen], then: list[QueueSeen], passed_s: float
) -> None:
    before = Before.read(orjson.loads(orjson.dumps(kept(first))))
    waited = {one.name for one in first if one.waits}
    earlier = {one.name: one.went for one in first}
    full = {one.name: one for one in of_queues(then, before, passed_s)}
    for one in then:
        is_full = one.waits and one.slots > 0 and (one.in_use >= one.slots or one.name in waited)
        assert (one.name in full) == (is_full and one.name in earlier)
    for name, added in full.items():
        (now,) = [one.went for one in then if one.name == name]
        assert added.full_s == passed_s
        assert 0 <= added.went <= sum(now.values())
        if not set(now) & set(earlier.get(name, {})):
            assert added.went == 0, "of a new worker nobody knows when it took its work"


def test_what_a_queue_let_go_is_counted_by_worker() -> None:
    before = Before(went={"default": {"a": 10, "gone": 7}}, waits=["default"])
    now = QueueSeen(name="default", slots=4, in_use=1, waits=True, went={"a": 15, "new": 100})
    ((kind, name, full_s, waited_s, went),) = of_queues([now], before, 1.0)
    assert (kind, name, full_s, waited_s, went) == ("queue", "default", 1.0, 1.0, 5)
    assert Before.read({}) == Before()


@given(st.sets(st.text(max_size=5)), st.sets(st.text(max_size=5)), st.floats(0, 2))
def test_rooms_and_orgs_are_added_up_once_each(
    full: set[str], waiting: set[str], passed_s: float
) -> None:
    rooms = of_rooms(full, waiting, passed_s)
    assert [one.name for one in rooms] == sorted(full)
    assert all(one.waited_s == (passed_s if one.name in waiting else 0.0) for one in rooms)
    assert [one.name for one in of_orgs([7, 3], passed_s)] == ["3", "7"]
