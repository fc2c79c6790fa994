"""Holds real responses against the OpenAPI document that the same app publishes."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import jsonschema_rs


class Conformity:
    """Checks that a response has a documented status, media type and shape."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document["components"]
        self._validators: dict[str, Any] = {}
        self._paths = [
            (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), operations)
            for path, operations in document["paths"].items()
        ]

    async def check(self, response: httpx2.Response) -> None:
        """Raise AssertionError when a response is not as documented; streams are left unread."""
        operation = self._operation(response)
        if operation is None:
            return
        named = f"{response.request.method} {response.url.path} {response.status_code}"
        documented = operation["responses"].get(str(response.status_code))
        assert documented is not None, f"{named} is not documented"
        media_type = response.headers.get("content-type", "")
        if response.status_code == 204 or media_type == "text/event-stream":
            return
        assert media_type in documented["content"], f"{named}: {media_type} is not documented"
        if "json" not in media_type or media_type.endswith("ndjson"):
            return
        await response.aread()
        validator = self._validator(documented["content"][media_type]["schema"])
        for error in validator.iter_errors(response.json()):
            raise AssertionError(f"{named}: {error.instance_path}: {error.message}")

    def _validator(self, schema: dict[str, Any]) -> Any:
        """Return the validator of a schema, made once: that takes longer than most tests."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._validators:
            whole = {**schema, "components": self._components}
            self._validators[key] = jsonschema_rs.validator_for(whole)
        return self._validators[key]

    def _operation(self, response: httpx2.Response) -> dict[str, Any] | None:
        for path, operations in self._paths:
            if path.fullmatch(response.url.path):
                found: dict[str, Any] | None = operations.get(response.request.method.lower())
                return found
        return None
