"""The flows of docs/patterns.md are taken from the page and run."""

from __future__ import annotations

import importlib.util
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from tests.engine.conftest import Pond, pond  # noqa: F401 - a fixture
from tests.engine.test_signals import tell

from millpond.engine import views


@pytest.fixture(scope="module")
def example(root: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the module that the page's Python block is."""
    page = (root / "docs" / "patterns.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("flows") / "orders_of_the_docs.py"
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


async def test_an_order_is_shipped_when_it_is_paid(pond: Pond, example: Any) -> None:  # noqa: F811
    lines = [{"sku": "kettle", "count": 1}, {"sku": "cup", "count": 6}]
    async with pond.worker(flows=[example.ship, example.pack]):
        run_id = await pond.submit(example.ship, {"order": "A-100", "lines": lines})
        await pond.until(run_id, "run.waiting")
        async with pond.db.org(pond.org_id) as con:
            shown = await views.state_values(con, pond.org_id, run_id)
        assert shown == {"stage": '"waiting for the payment"'}
        await tell(pond, run_id, "paid", {"cents": 4900})
        row = await pond.ended(run_id)
    assert row["output"] == {
        "order": "A-100",
        "cents": 4900,
        "parcels": ["parcel of 1 x kettle", "parcel of 6 x cup"],
        "missing": [],
    }


async def test_deliveries_are_counted_over_successors(pond: Pond, example: Any) -> None:  # noqa: F811
    async with pond.worker(flows=[example.count]):
        run_id: uuid.UUID = await pond.submit(example.count, {"rounds": 2})
        await tell(pond, run_id, "delivery")
        await tell(pond, run_id, "delivery")
        following = (await pond.ended(run_id))["continued_to"]
        await tell(pond, following, "delivery")
        await tell(pond, following, "stop")
        assert (await pond.ended(following))["output"] == 3
