"""Models: text models and embedders of many providers, and two bundled ones, behind one small port."""

from millpond.models.opening import open_embedder, open_text_model
from millpond.models.port import Completion, Embedder, Message, TextModel

__all__ = [
    "Completion",
    "Embedder",
    "Message",
    "TextModel",
    "open_embedder",
    "open_text_model",
]
