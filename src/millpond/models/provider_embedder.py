"""Embedders of providers that speak OpenAI's embeddings protocol (OpenAI, Ollama, many servers).

Opened by `models.open_embedder`. Invariant: one batch is one request, and every vector has exactly
the wished length and norm 1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from pydantic_ai.embeddings import EmbeddingSettings
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.providers.openai import OpenAIProvider

from millpond.errors import Permanent, Transient
from millpond.models.provider_errors import translated
from millpond.models.providers import OLLAMA_URL, OPENAI_URL, open_http, open_openai_client

_BATCH = 128


class ProviderEmbedder:
    """A provider's embedding model, asked for vectors of `dimensions`."""

    def __init__(
        self,
        provider: str,
        name: str,
        base_url: str,
        api_key: str,
        *,
        dimensions: int,
        timeout_s: float,
    ) -> None:
        self.name = f"{provider}:{name}"
        self.dimensions = dimensions
        self._timeout_s = timeout_s
        self._http = open_http(timeout_s)
        default = OLLAMA_URL if provider == "ollama" else OPENAI_URL
        client = open_openai_client(base_url or default, api_key, self._http)
        self._model = OpenAIEmbeddingModel(name, provider=OpenAIProvider(openai_client=client))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of length 1 per text, in requests of at most 128 texts."""
        vectors: list[list[float]] = []
        for first in range(0, len(texts), _BATCH):
            vectors += await self._request(list(texts[first : first + _BATCH]))
        return vectors

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _request(self, texts: list[str]) -> list[list[float]]:
        settings = EmbeddingSettings(dimensions=self.dimensions)
        with translated(self.name):
            async with asyncio.timeout(self._timeout_s):
                answer = await self._model.embed(texts, input_type="document", settings=settings)
        if len(answer.embeddings) != len(texts):
            raise Transient(
                f"{self.name} embedded {len(answer.embeddings)} of {len(texts)} texts.",
                code="model_cut_off",
            )
        return [self._unit(vector) for vector in answer.embeddings]

    def _unit(self, vector: Sequence[float]) -> list[float]:
        if len(vector) != self.dimensions:
            raise Permanent(
                f"{self.name} gives vectors of {len(vector)} dimensions; {self.dimensions} are "
                "needed.",
                code="embedding_dimensions",
                advice="Choose a model that can be asked for that many.",
            )
        array = np.asarray(vector, dtype=np.float64)
        norm = float(np.linalg.norm(array))
        if not np.isfinite(norm) or norm == 0:
            raise Transient(f"{self.name} gave no usable vector.", code="embedding_failed")
        unit: list[float] = (array / norm).tolist()
        return unit
