"""On a GPU: the kernels in the types that models are trained in, against float64.

None of this runs without CUDA; ``make gpu-check`` runs it and the benchmark.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftref.ops.block_rotate.op import OPERATOR as BLOCK_ROTATE
from peftref.ops.bottleneck.op import OPERATOR as BOTTLENECK
from peftref.ops.delta_rownorm.op import OPERATOR as ROWNORM
from peftref.ops.dora_linear.op import OPERATOR as DORA
from peftref.ops.givens.op import OPERATOR as GIVENS
from peftref.ops.linear_cross_entropy.op import OPERATOR as CROSS_ENTROPY
from peftref.ops.lora_linear.op import OPERATOR as LORA
from peftref.ops.lora_linear_batched.op import OPERATOR as BATCHED
from peftref.ops.operator import Operator
from peftref.ops.rotated_linear.op import OPERATOR as ROTATED
from peftref.ops.scale_shift.op import OPERATOR as SCALE_SHIFT
from peftref.ops.seeded_dropout.op import OPERATOR as DROPOUT
from tests.ops import (
    test_block_rotate,
    test_bottleneck,
    test_delta_rownorm,
    test_dora_linear,
    test_givens,
    test_linear_cross_entropy,
    test_lora_linear,
    test_lora_linear_batched,
    test_rotated_linear,
    test_scale_shift,
)
from tests.ops.agreement import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ON_GPU = "TESTS_OPS_UNDER_SANITIZER"


def _moved(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    def one(a: Any) -> Any:
        if isinstance(a, list):
            return [one(t) for t in a]
        if not isinstance(a, Tensor):
            return a
        kind = dtype if a.is_floating_point() else a.dtype
        return a.detach().to("cuda", kind).requires_grad_(a.requires_grad)

    return [one(a) for a in arguments]


def _dropout() -> tuple[Any, ...]:
    x = torch.randn(65, 130, requires_grad=True)
    return x, 0.3, torch.tensor([5, 7], dtype=torch.int32)


CASES: list[tuple[Operator[Any], Callable[[], tuple[Any, ...]]]] = [
    (DROPOUT, _dropout),
    (LORA, lambda: test_lora_linear.arguments(1, (3, 70), 96)),
    (LORA, lambda: test_lora_linear.arguments(3, (200,), 130, 0.25)),
    (BATCHED, lambda: test_lora_linear_batched.arguments(3, (70,), 96, 5)),
    (BATCHED, lambda: test_lora_linear_batched.arguments(4, (70,), 96, 5, 2)),
    (BOTTLENECK, lambda: test_bottleneck.arguments("gelu", (3, 70), 96, 48)),
    (BOTTLENECK, lambda: test_bottleneck.arguments("relu", (3, 70), 96, 128, "residual")),
    (SCALE_SHIFT, lambda: test_scale_shift.arguments([3, 70, 96], shift=True)),
    (ROWNORM, lambda: test_delta_rownorm.arguments(96, 130, 5, known=False)),
    (DORA, lambda: tuple(test_dora_linear.arguments((3, 70, 96), 130, 5))),
    (BLOCK_ROTATE, lambda: test_block_rotate.arguments([3, 70], 4, 20, orthogonal=False)),
    (ROTATED, lambda: test_rotated_linear.arguments([3, 70], 3, 32, 130)),
    (GIVENS, lambda: test_givens.arguments([3, 70], 100, free=False)),
    (CROSS_ENTROPY, lambda: tuple(test_linear_cross_entropy.arguments(70, 130))),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_against_float64(case: int, dtype: torch.dtype) -> None:
    """Arguments are rounded first, so that only the arithmetic differs."""
    torch.manual_seed(case)
    operator, draw = CASES[case]
    arguments = _moved(draw(), dtype)
    found = run(operator, arguments)
    wanted = run(operator.reference, _moved(tuple(arguments), torch.float64))
    # Sums of up to 210 products, each rounded once more than exact arithmetic would.
    tolerance = 1e-4 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    for mine, right in zip(found, wanted, strict=True):
        assert (mine.double() - right).norm() <= tolerance * right.norm().clamp(min=1.0)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_compiles_whole(case: int) -> None:
    operator, draw = CASES[case]
    arguments = _moved(draw(), torch.bfloat16)
    compiled = torch.compile(operator, fullgraph=True)
    for mine, right in zip(run(compiled, arguments), run(operator, arguments), strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)


def test_the_mask_is_that_of_the_cpu() -> None:
    x, p, seed = _dropout()
    wanted = DROPOUT(x, p, seed) != 0
    found = DROPOUT(*_moved((x, p, seed), torch.float32)) != 0
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.skipif(ON_GPU in os.environ, reason="already under the sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_memory_errors(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    result = subprocess.run(
        [*command, "-q", "-n", "0", "-k", "against_float64 and dtype0", __file__],
        env={**os.environ, ON_GPU: "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
