"""Calls about questions to humans."""

from __future__ import annotations

from typing import Any

from millpond.client.call import Call, Id, get, given, id_text, path_of, post
from millpond.client.models import InputRequest, Page

_ROOT = "input-requests"


def list_input_requests(
    *,
    state: str | None = None,
    role: str | None = None,
    run_id: Id | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[InputRequest]]:
    """Questions to humans, newest first."""
    return get(
        path_of(_ROOT),
        Page[InputRequest],
        state=state,
        role=role,
        run_id=id_text(run_id),
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def get_input_request(request_id: Id) -> Call[InputRequest]:
    """Return one question."""
    return get(path_of(_ROOT, request_id), InputRequest)


def resolve_input_request(
    request_id: Id, answer: Any, *, digest: str | None = None
) -> Call[InputRequest]:
    """Decide a question, once; give the `digest` that was shown to approve nothing else."""
    body = {"answer": answer, **given({"digest": digest})}
    return post(path_of(_ROOT, request_id, "resolve"), InputRequest, body)
