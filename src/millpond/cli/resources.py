"""What steps and routes may ask for: the text model, the embedder, the knowledge store, the egress guard.

Called by `work` and `serve`. Invariant: a model that cannot be opened is left out with a warning, so
that whatever does not need it still works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import structlog
from pydantic import SecretStr

from millpond.db.pool import Database
from millpond.errors import MillpondError
from millpond.integrations.egress import Egress
from millpond.integrations.egress_rules import Rules
from millpond.knowledge.store import KnowledgeStore
from millpond.models.opening import open_embedder, open_text_model
from millpond.models.port import Embedder, TextModel
from millpond.settings import Settings

Model = TypeVar("Model", TextModel, Embedder)
_log = structlog.get_logger("millpond.models")


def open_step_resources(
    settings: Settings, db: Database, stack: contextlib.AsyncExitStack
) -> dict[type, object]:
    """Open what registered steps get by `StepContext.get`; `stack` closes it again."""
    resources: dict[type, object] = {}
    text = _opened("text model", lambda: _open_text(settings), stack)
    if text is not None:
        resources[TextModel] = text
    store = open_knowledge(settings, db, stack)
    if store is not None:
        resources[Embedder] = store.embedder
        resources[KnowledgeStore] = store
    return resources


def open_knowledge(
    settings: Settings, db: Database, stack: contextlib.AsyncExitStack
) -> KnowledgeStore | None:
    """Open the knowledge store with its embedder, or return None when there is no embedder."""
    embedder = _opened("embedder", lambda: _open_embedder(settings), stack)
    return KnowledgeStore(db, embedder) if embedder is not None else None


def open_egress(settings: Settings, stack: contextlib.AsyncExitStack) -> Egress:
    """Open the guard of all that goes to addresses which organizations name; `stack` closes it again."""
    egress = Egress(Rules.of_text(settings.egress_allow))
    stack.push_async_callback(egress.close)
    return egress


def _open_text(settings: Settings) -> TextModel:
    return open_text_model(settings.llm, settings.llm_base_url, _secret(settings.llm_api_key))


def _open_embedder(settings: Settings) -> Embedder:
    # The text model's address and key serve for embeddings of the same provider at the same place.
    providers = {spec.partition(":")[0] for spec in (settings.llm, settings.embedder)}
    is_shared = len(providers) == 1 and not settings.embedder_base_url
    base_url = settings.embedder_base_url or (settings.llm_base_url if is_shared else "")
    key = settings.embedder_api_key or (settings.llm_api_key if is_shared else None)
    return open_embedder(settings.embedder, base_url, _secret(key))


def _secret(value: SecretStr | None) -> str:
    return value.get_secret_value() if value else ""


def _opened(
    what: str, opening: Callable[[], Model], stack: contextlib.AsyncExitStack
) -> Model | None:
    try:
        model = opening()
    except MillpondError as error:
        _log.warning("model.left_out", what=what, reason=error.message, advice=error.advice)
        return None
    stack.push_async_callback(model.close)
    _log.info("model.opened", what=what, model=model.name)
    return model
