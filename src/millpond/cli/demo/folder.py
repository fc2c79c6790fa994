"""The demo's own folder: made for one performance, gone after it, also after one that was killed.

Called by `command`. Invariant: only folders that carry the demo's name, belong to this user and whose
process is gone are swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from millpond.db.embedded import EmbeddedPostgres
from millpond.errors import MillpondError

_PREFIX = "millpond-demo-"
_KEPT = "millpond-kept-demo-"


@contextmanager
def private_folder(*, keep: bool) -> Iterator[Path]:
    """Make a folder for this demo alone, and remove it afterwards; `data` in it is for the platform.

    As root, the database's own system user has to reach it, so others may pass through the folder,
    not read it.
    """
    _sweep(Path(tempfile.gettempdir()))
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(prefix=f"{_KEPT if keep else _PREFIX}{os.getpid()}-"))
    folder.chmod(0o711 if as_root else 0o700)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """End the databases of demos that were killed, and remove their folders."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(MillpondError, OSError):
            if folder.lstat().st_uid == os.geteuid():
                if (folder / "data").is_dir():
                    asyncio.run(EmbeddedPostgres(folder / "data").stop_left_over())
                shutil.rmtree(folder, ignore_errors=True)
