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


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_orders_of_what_can_happen_keep_the_engines_promises(ground: Ground) -> None:
    _explore(ground, examples=int(os.environ.get("MILLPOND_SOAK_EXAMPLES", "500")), rules=80)
