"""The OpenAPI document: complete, and changed only on purpose.

Renew the golden file with: pytest tests/api/test_openapi.py --renew-golden
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millpond.api.auth import PUBLIC

from .conftest import Client, Front

GOLDEN = Path(__file__).parent.parent / "golden" / "openapi.json"


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


async def test_document_is_the_golden_one(
    front: Front, ann: Client, request: pytest.FixtureRequest
) -> None:
    document = (await ann.get("/openapi.json")).json()
    document["info"]["version"] = "golden"
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if request.config.getoption("--renew-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8")
    changed = difflib.unified_diff(
        golden.splitlines(), text.splitlines(), "golden", "served", n=12, lineterm=""
    )
    assert not (lines := list(changed)), "\n".join(["renew with --renew-golden", *lines[:80]])


async def test_everything_is_described(front: Front) -> None:
    seen = set()
    for name, operation in operations(front.app.openapi()):
        assert operation.get("description"), name
        assert "_" in operation["operationId"], name
        assert operation["operationId"] not in seen
        seen.add(operation["operationId"])
        for parameter in operation.get("parameters", []):
            is_plain_path = parameter["in"] == "path"
            assert is_plain_path or parameter.get("description"), f"{name} {parameter['name']}"


async def test_every_reference_leads_somewhere(front: Front) -> None:
    document = front.app.openapi()
    schemas = document["components"]["schemas"]

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            for value in part.values():
                yield from references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    found = set(references(document))
    assert found
    for reference in found:
        prefix, _, name = reference.rpartition("/")
        assert prefix == "#/components/schemas"
        assert name in schemas


async def test_guarded_operations_name_the_scheme(front: Front) -> None:
    document = front.app.openapi()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for name, operation in operations(document):
        is_guarded = name.partition(" ")[2] not in PUBLIC
        assert ("security" in operation) == is_guarded, name
        if is_guarded:
            assert {"401", "403", "503"} <= set(operation["responses"]), name


async def test_failures_are_problem_documents(front: Front) -> None:
    for name, operation in operations(front.app.openapi()):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (name, status)
