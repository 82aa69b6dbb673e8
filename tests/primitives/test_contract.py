"""Every shipped primitive keeps the contract, in each of its variants."""

from __future__ import annotations

import torch
from torch import Tensor

from peftref.registry import primitives
from peftref.testing.primitive_contract import Case, PrimitiveContract

KINDS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "identity")


class TestLinear(PrimitiveContract):
    cases = (
        Case("linear"),
        Case("linear", {"init": "zeros"}),
        Case("linear", {"out": 5}),
        Case("linear", {"out": 5, "bias": True, "init": "zeros"}),
        Case("linear", {"bias": True, "bias_init": "ones", "init": "zeros"}),
    )


class TestFrozen(PrimitiveContract):
    cases = (Case("frozen", {"out": 5, "seed": 3}), Case("frozen", {"share": "all"}))


class TestElementwise(PrimitiveContract):
    cases = (
        *(Case("activation", {"kind": kind}) for kind in KINDS),
        Case("vector"),
        Case("vector", {"init": "zeros"}),
        Case("vector", {"init": "constant(0.1)"}),
        Case("bias"),
        Case("bias", {"init": "ones"}),
        Case("norm"),
        Case("norm", {"kind": "rms"}),
        Case("dropout"),
        Case("dropout", {"p": 0.5}),
    )


class TestRotation(PrimitiveContract):
    cases = (Case("rotation", {"block": 4}), Case("rotation", {"block": 12}),
             Case("rotation", {"block": 2}), Case("rotation", {"block": 3, "block_share": True}))


class TestPartial(PrimitiveContract):
    cases = (Case("sparse", {"rank": 2}), Case("sparse", {"rank": 1, "seed": 3}),
             Case("row_scale"), Case("weight_mask"), Case("chosen_rows", {"rows": "1, 4:6"}))


class TestOtherRotations(PrimitiveContract):
    cases = (
        *(Case("givens", {"kind": kind}, d_in=d) for d in (2, 5, 8, 12) for kind in
          ("angle", "free")),
        Case("reflections", {"rank": 2}),
        Case("reflections", {"rank": 6}),
        Case("butterfly", {"block": 2, "factors": 2}),
        Case("butterfly", {"block": 4, "factors": 3}, d_in=32),
        Case("butterfly", {"block": 3, "factors": 1}),
        *(Case("pair_rotation", {"group": 4, "variant": variant}) for variant in (1, 2, 4)),
    )


class TestKron(PrimitiveContract):
    cases = (
        Case("kron", {"rank": 1}),
        Case("kron", {"rank": 1, "decompose_both": True, "factor": 4}),
        Case("kron", {"rank": 64, "factor": 1}),
        Case("kron", {"rank": 2}, d_in=7, d_out=13),
        Case("kron", {"rank": None, "factor": 2}),
    )


class TestStructured(PrimitiveContract):
    cases = (
        Case("unit_linear"),
        Case("unit_linear", {"out": 5, "unit": "columns", "init": "zeros"}),
        Case("frozen", {"out": 5, "seed": None, "init": "svd_scaled_right"}),
        Case("vector", {"init": "input_norm", "trainable": False}),
        Case("vector", {"scalar": True}),
        Case("expert_gate", {"experts": 3, "task": 5}),
        Case("weight_blocks", {"block": 4}),
        Case("spectrum", {"count": 20}),
        Case("spectrum", {"count": 20, "kind": "haar"}, d_in=9, d_out=7),
        Case("circulant", {"block": 4}),
        Case("circulant", {"block": 2, "init": "zeros"}),
        Case("square", {"rank": 2}),
        Case("square", {"rank": 2, "kind": "sum"}),
        Case("square", {"rank": 1}, d_in=8, d_out=40),
        Case("random_bases", {"rank": 3}),
        Case("random_bases", {"rank": 3}, d_in=6, d_out=9),
        Case("bank_linear", {"vectors": 6, "length": 4, "out": 3}),
        Case("bank_linear", {"vectors": 6, "length": 4, "along": "outputs", "topk": 6}),
        Case("mpo", {"bond": 3}),
        Case("mpo", {"bond": 2}, d_in=96, d_out=60),
        Case("fastfood", {"size": 5}),
        Case("fastfood", {"size": 5, "scaled": False}),
        Case("fold", {"width": 4}),
        Case("fold", {"width": 5}),
        Case("fold", {"width": 5, "pad": "wrap"}),
        Case("pool", {"group": 3}),
        Case("shuffle", {"group": 2}),
        Case("shuffle", {"group": 1}),
        Case("tile", {"out": 8}),
        Case("tile", {"out": 30}),
        Case("block_linear", {"blocks": 4}),
        Case("block_linear", {"blocks": 2, "out": 6, "init": "zeros"}),
        Case("phm_linear", {"factor": 2}),
        Case("phm_linear", {"factor": 4, "rank": 2, "share": "rule", "rule_init": "zeros"}),
        Case("phm_linear", {"factor": 4, "rank": 0, "bias": True}),
    )


class TestSources(PrimitiveContract):
    cases = (
        Case("tokens", {"length": 3}),
        Case("tokens", {"length": 3, "width": "hidden_size"}),
        Case("tokens", {"length": 3, "init": "zeros"}),
        Case("delta"),
        Case("delta", port_shape=(8,)),
    )


class TestWeights(PrimitiveContract):
    cases = (Case("backbone_weight"), Case("quantise"),
             Case("quantise", {"kind": "int", "bits": 3, "block": 4}),
             Case("quantise", {"block": 16, "rank": 2, "rounds": 2}), Case("column_norm"),)


class TestCombinators(PrimitiveContract):
    cases = (Case("sum", d_in=8, streams=3), Case("product", d_in=8, streams=2),
             Case("since_start", d_in=8, streams=2), Case("chain"))


class TestStreams(PrimitiveContract):
    cases = (
        Case("self_attention", {"heads": 2, "width": 3}),
        Case("self_attention", {"output": "normal(0.02)"}),
        Case("subspace", {"rank": 3}),
        Case("subspace", {"rank": 3, "orthogonal": False}),
        Case("additive_coupling"),
        Case("additive_coupling", {"init": "zeros", "inverse": True}),
        Case("leading"),
        Case("mean_tokens"),
        Case("fold", {"groups": 2}),
    )


class TestStacks(PrimitiveContract):
    cases = (Case("layer_attention"), Case("ladder", {"reduction": 3, "heads": 2}),
             Case("ladder", {"reduction": 2, "heads": 3, "skip": 2}))

    @staticmethod
    def stream(case: Case, seed: int = 0) -> Tensor:
        """States of three layers."""
        return torch.stack([PrimitiveContract.stream(case, seed + 10 * i) for i in range(3)])

    @staticmethod
    def tokens(case: Case, x: Tensor) -> int:
        return x[0].numel() // case.d_in


class TestRows(PrimitiveContract):
    cases = (Case("lstm", {"hidden": 5}), Case("lstm", {"hidden": 4, "layers": 2}))

    @staticmethod
    def stream(case: Case, seed: int = 0) -> Tensor:
        """Learned rows have no batch."""
        return PrimitiveContract.stream(case, seed)[0]

    def test_flops_are_at_least_those_that_torch_counts(self, case: Case) -> None:
        """Torch counts none of a fused recurrent layer: its products are written out."""
        h, d = int(str(case.arguments["hidden"])), case.d_in
        layers = int(str(case.arguments.get("layers", 1)))
        rows = [d, *[2 * h] * (layers - 1)]
        assert case.make().flops() == sum(2 * 2 * 4 * h * (width + h) for width in rows)


class TestKeysAndValues(PrimitiveContract):
    cases = tuple(Case("own_keys_values", arguments, d_in=16)
                  for arguments in ({}, {"gate": "layer"}, {"squash": False}))

    def test_what_holds_at_the_start_is_true(self, case: Case) -> None:
        """The values are zero, and with them attention over the rows; the keys are not."""
        keys, values = self.apply(case, start=True)(self.stream(case)).chunk(2, -1)
        assert case.make().algebra().zero_at_init
        assert not bool(values.any())
        assert bool(keys.all())


def test_none_is_left_out():
    suites = PrimitiveContract.__subclasses__()
    proved = {case.name for suite in suites for case in suite.cases}
    assert proved == set(primitives.names())
