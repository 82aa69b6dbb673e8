"""The kernels, joined by the op's rule, against the definition."""

from __future__ import annotations

import functools

import pytest
import torch

from peftref.ops.bottleneck import triton
from peftref.ops.bottleneck.op import OPERATOR
from peftref.ops.bottleneck.reference import ACTIVATIONS
from peftref.ops.lora_linear.triton import Tile
from peftref.ops.operator import Kernels
from tests.ops.agreement import assert_kernels_agree
from tests.ops.test_bottleneck import arguments

# A sigmoid far on the left is 1 / infinity, which is what it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

SMALL = Tile(16, 16, 16, 1, 1)
KERNELS = Kernels(
    functools.partial(triton.forward, tile=SMALL), functools.partial(triton.backward, tile=SMALL)
)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("parts", ["into biases gate", "residual"])
def test_equals_the_definition(activation: str, parts: str) -> None:
    given = arguments(activation, (3, 7), 19, 5, parts)
    assert_kernels_agree(OPERATOR, KERNELS, given, 1e-4)


def test_float16() -> None:
    given = arguments("gelu", (3, 7), 19, 5, "residual biases gate", torch.float16)
    assert_kernels_agree(OPERATOR, KERNELS, given, 1e-2)
