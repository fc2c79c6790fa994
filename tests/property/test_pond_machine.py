"""Any order of submits, claims, waits, ends, expiries and lost attempts keeps the engine's promises."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.property.conftest import Ground
from tests.property.pond_machine import PondMachine


def _explore(ground: Ground, *, examples: int, rules: int) -> None:
    run_state_machine_as_test(
        lambda: PondMachine(ground),
        settings=settings(
            max_examples=examples,
            stateful_step_count=rules,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # a failure is shrunk, which takes a while
def test_any_order_of_what_can_happen_keeps_the_engines_promises(ground: Ground) -> None:
    _explore(ground, examples=40, rules=60)


def test_a_third_death_is_what_the_model_takes_it_for(ground: Ground) -> None:
    state = PondMachine(ground)
    try:
        state.begin(delayed=False)
        state.submit(count=2, delayed=False, org=0, priority=0)
        for _ in range(3):
            state.start_worker()
            state.claim(nth=0, want=3)
            state.expire(nth=0)
            state.rescue()
            state.database_is_as_the_model_says()
        assert state.model.of("failed")
    finally:
        state.teardown()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_orders_of_what_can_happen_keep_the_engines_promises(ground: Ground) -> None:
    _explore(ground, examples=int(os.environ.get("MILLPOND_SOAK_EXAMPLES", "500")), rules=80)
