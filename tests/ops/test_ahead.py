"""Kernels compiled for GPUs; ``make kernels-aot`` compiles all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.triton_aot
def test_a_kernel_of_each_op_fits() -> None:
    """One form each."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.ahead", "--first"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
