"""Triton's kernels under its interpreter, without a GPU.

The interpreter is chosen when the kernels are imported, hence a process of its own. It computes
bfloat16 wrongly, so the types are float32 and float16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.triton_interpret
def test_kernels_equal_the_definitions() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    result = subprocess.run(
        [*command, str(HERE / "interpreted")],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
