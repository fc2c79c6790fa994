"""Properties of steps that ride under bounds: none takes room that its branch could not use, and none is held up."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.admission import Room
from millpond.engine.bounds import Bound, Copies
from millpond.engine.seats import Line, Want

# Outer and inner branch, and room, of each step in line; the bounds, and the places of each room.
steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=20
)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 3), st.integers(1, 3), st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_no_more_steps_take_room_than_their_bounds_let_go_on_and_no_room_stays_that_one_could_use(
    stands: list[tuple[int, int, int]], outer: int, inner: int, places: tuple[int, int]
) -> None:
    rooms = [Room(left=left, name=str(nth)) for nth, left in enumerate(places)]
    above, below = Bound(outer), [Bound(inner) for _ in range(4)]
    copies = Copies()
    wants = [
        Want(
            rooms=[rooms[room]],
            since_us=nth,
            bounds=copies.of(((below[out], (out, into)), (above, out))),
        )
        for nth, (out, into, room) in enumerate(stands)
    ]
    line = Line(wants)
    line.begin()
    line.finish()
    went = [stand for stand, want in zip(stands, wants, strict=True) if want.has_gone]
    assert len({out for out, _, _ in went}) <= outer
    for of in range(4):
        assert len({into for out, into, _ in went if out == of}) <= inner
    spent = Counter(room for _, _, room in went)
    for nth, room in enumerate(rooms):
        assert room.left == places[nth] - spent[nth], "what has not gone spends nothing"
    for (out, into, nth), want in zip(stands, wants, strict=True):
        if not want.has_gone and rooms[nth].left:
            outs = {of for of, _, _ in went}
            intos = {to for of, to, _ in went if of == out}
            has_place = (out in outs or len(outs) < outer) and (into in intos or len(intos) < inner)
            assert want.is_beyond
            assert not has_place
    assert not any(one.placed for one in (above, *below)), "only copies were taken of"
