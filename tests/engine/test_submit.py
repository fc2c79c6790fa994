"""What submit refuses, whoever submits: the API, a schedule, a flow that starts another."""

from __future__ import annotations

import pytest

from millpond.engine.submit import check
from millpond.errors import InvalidInput
from millpond.types import Intent


@pytest.mark.parametrize("labels", [{"a": "x\0"}, {"a\0": "x"}])
def test_a_label_that_cannot_be_searched_is_refused(labels: dict[str, str]) -> None:
    intent = Intent(
        org_id=1,
        flow="f",
        version=1,
        queue="default",
        input=b"{}",
        subject="user:ann",
        labels=labels,
    )
    with pytest.raises(InvalidInput) as caught:
        check(intent, 1)
    assert caught.value.param == "labels"
