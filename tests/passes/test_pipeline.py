"""Each pass on a table of four sites, the graph after it as text."""

from __future__ import annotations

import pytest

import peftref.spec
from peftref.backbone.site_table import AttentionShape, Site, SiteKind, SiteTable
from peftref.errors import CompositionError, SpecError
from peftref.ir.graph import AdapterGraph
from peftref.ir.printer import print_graph
from peftref.passes.base import Pipeline
from peftref.passes.pipelines import default_passes
from peftref.registry import couplings, primitives, procedures


class _Library:
    def primitive(self, name: str) -> type:
        return primitives.get(name)

    def coupling(self, name: str) -> type:
        return couplings.get(name)

    def procedure(self, name: str) -> type:
        return procedures.get(name)


def _linear(role: str, d_in: int, d_out: int) -> Site:
    kind = SiteKind.LINEAR
    return Site(role, "decoder", 0, f"layers.0.{role}", kind, d_in, d_out, bias=True)


# Wide enough for thin factors to cost less than a formed weight.
_WIDE = 64
_SHAPE = AttentionShape(2, 2, 32, "layers.0.attention", causal=True)
_TABLE = SiteTable(
    family="test",
    hidden_size=_WIDE,
    vocabulary=11,
    layers={"decoder": 1},
    sites=(
        _linear("attention.query", _WIDE, _WIDE),
        _linear("attention.key", _WIDE, _WIDE),
        _linear("attention.value", _WIDE, _WIDE),
        Site("attention", "decoder", 0, "layers.0.attention", SiteKind.ATTENTION, _WIDE, _WIDE,
             attention=_SHAPE),
        _linear("ffn.down", 2 * _WIDE, _WIDE),
    ),
)


def _after(name: str, expression: str, site: str = "decoder.0.attention.query") -> str:
    """The graph after the pass ``name``, as text."""
    seen: dict[str, str] = {}

    def observe(done: str, graph: AdapterGraph) -> None:
        seen[done] = print_graph(graph, [site])

    graph = AdapterGraph(peftref.spec.load(expression), _TABLE)
    Pipeline(default_passes(_Library()), observe).run(graph)
    return seen[name]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _check(found: str, expected: str) -> None:
    assert [line.rstrip() for line in found.splitlines()] == _lines(expected)


def test_resolve_sites_makes_a_read_a_function_and_a_write() -> None:
    _check(_after("resolve sites", "ia3", "decoder.0.ffn.down"), """
        %0 = read decoder.0.ffn.down.input:128 ()
        %1 = function vector(%0)
        %2 = write ia3.ffn @ decoder.0.ffn.down.input sequential rescale (%1)
    """)


def test_expand_functions_infers_widths_and_tensors() -> None:
    _check(_after("expand functions and infer shapes", "lora(rank=2, alpha=6)"), """
        %0 = read decoder.0.attention.query.input:64 ()
        %1 = tensor down.weight 2x64 kaiming_uniform ()
        %2 = linear:2 (%0, %1)
        %3 = tensor up.weight 64x2 zeros ()
        %4 = linear:64 (%2, %3)
        %5 = write lora.delta @ decoder.0.attention.query.output parallel scaled_add 3 (%4)
    """)


def test_mix_stacks_every_tensor_and_routes_each_primitive_apart() -> None:
    _check(_after("apply couplings", "mix(lora(rank=2), copies=3, share=['up.*'])"), """
        %0 = read decoder.0.attention.query.input:64 ()
        %1 = tensor down.weight 3x2x64 kaiming_uniform ()
        %2 = tensor up.weight 64x2 zeros ()
        %3 = route:0 (%1)
        %4 = select_copy:0 (%1, %3)
        %5 = linear:2 (%0, %4)
        %6 = linear:64 (%5, %2)
        %7 = write lora.delta @ decoder.0.attention.query.output parallel scaled_add 8 (%6)
    """)


def test_tie_parameters_gives_unequal_sites_corners_of_one_tensor() -> None:
    text = _after("tie parameters", "vera(rank=2, site='{attention,ffn}.{query?,down?}')")
    assert " 2x128 " in text
    assert "leading_corner" in text


def test_derive_properties_and_lowering_of_a_stack() -> None:
    text = _after("choose lowering", "dora(rank=2) + oft(block=4)")
    writes = [line.split("=", 1)[1] for line in text.splitlines() if "= write" in line]
    assert [line.split("[")[1].split("]")[0] for line in writes] == [
        "weight_add, factored", "weight_norm, factored", "weight_rotate, factored",
    ]


def test_simplify_shares_reads_and_skips_dropout_of_zero() -> None:
    text = _after("simplify", "lora(rank=2) + ia3(site='attention.query') + houlsby_adapter("
                  "bottleneck=2, site='attention.query')")
    reads = [line for line in text.splitlines() if " read " in line]
    assert len(reads) == 2  # the input, and the output that two members edit


def test_fuse_marks_products_that_add_to_all_rows() -> None:
    assert "accumulates" in _after("fuse", "lora(rank=2)")
    assert "accumulates" not in _after("fuse", "loha(rank=2)")
    assert "accumulates" not in _after("fuse", "houlsby_adapter(bottleneck=2, site=attention)",
                                       "decoder.0.attention")


@pytest.mark.parametrize(
    ("expression", "error", "words"),
    [
        ("dora + dora", CompositionError, "both normalise"),
        ("oft(block=5)", CompositionError, "block 5 does not divide width 64; valid"),
                ("mix(lora, share=['nope'])", CompositionError, "share names 'nope'"),
        ("mix(lora, copies=1)", SpecError, "copies"),
        ("prune(ia3)", CompositionError, "no matrix to prune"),
    ],
)
def test_what_has_no_meaning_is_refused(
    expression: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _after("fuse", expression)


def test_a_function_of_the_wrong_width_is_refused() -> None:
    text = """
technique: wide
parameters: {}
modules:
  - name: m
    site: {select: attention.query}
    function: [{linear: {out: 3}}]
    interaction: {insertion: parallel, integration: add}
"""
    with pytest.raises(CompositionError, match="gives width 3, the port 'output' has width 64"):
        _after("fuse", text)


def test_the_failing_pass_is_named() -> None:
    with pytest.raises(CompositionError) as raised:
        _after("fuse", "dora + dora")
    assert any("raised in pass 'check rules'" in note for note in raised.value.__notes__)
