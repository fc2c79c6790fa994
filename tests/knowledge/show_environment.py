"""A stand-in for the reader's process that answers with its environment."""

from __future__ import annotations

import json
import os
import sys

sys.stdin.buffer.read()
print(json.dumps({"text": repr(dict(os.environ)), "title": None, "page_starts": []}))
