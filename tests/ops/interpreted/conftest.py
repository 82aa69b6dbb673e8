"""These tests run in a process of their own: see ``tests/ops/test_interpreted.py``."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
