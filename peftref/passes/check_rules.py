"""Rules that a composition must keep, each a small function with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from peftref.backbone.site_table import RowSlice, SiteKind
from peftref.errors import CompositionError
from peftref.ir.graph import AdapterGraph
from peftref.ir.types import Stage, WriteNode
from peftref.spec.typology import IntegrationKind, Port

__all__ = ["CheckRules", "overlap", "turns_slices"]

Rule = Callable[[list[WriteNode]], Iterator[str]]


@dataclass(frozen=True, slots=True)
class CheckRules:
    """Every rule sees the edits of one module that run together; a violation is raised."""

    name: str = "check rules"

    def run(self, graph: AdapterGraph) -> str:
        modules: dict[tuple[str, bool], list[WriteNode]] = {}
        for _, write in graph.writes():
            modules.setdefault((write.path, write.aside), []).append(write)
        for writes in modules.values():
            for rule in _RULES:
                for violation in rule(writes):
                    raise CompositionError(violation)
        trainable = any(
            tensor.spec.trainable
            for address, _ in graph.writes()
            for _, tensor in graph.tensors_of(address)
        )
        if not trainable:
            raise CompositionError("the composition trains nothing: no primitive has a tensor")
        return f"{len(_RULES)} rules over {len(modules)} modules"


def overlap(first: RowSlice | None, second: RowSlice | None) -> bool:
    """Whether two sites of one module have rows in common."""
    if first is None or second is None or first.groups != second.groups:
        return True
    ends = first.start + first.length, second.start + second.length
    return first.start < ends[1] and second.start < ends[0]


def turns_slices(writes: Sequence[WriteNode]) -> bool:
    """Whether all that happens to a weight is one rotation for each of some of its slices."""
    rotations = all(w.stage is Stage.WEIGHT_ROTATE and w.site.rows is not None
                    and w.site.kind is not SiteKind.MATRIX for w in writes)
    pairs = combinations(writes, 2)
    return rotations and not any(overlap(a.site.rows, b.site.rows) for a, b in pairs)


def _reads_a_stream(writes: list[WriteNode]) -> Iterator[str]:
    """An embedding is indexed, not multiplied: it has no input stream."""
    for write in writes:
        source = write.algebra is not None and write.algebra.source
        on_stream = write.stage in (Stage.PARALLEL, Stage.INPUT) or (
            write.stage is Stage.WEIGHT_ADD and not source
        )
        if write.site.kind is SiteKind.EMBEDDING and on_stream and write.read is Port.INPUT:
            yield (
                f"{write.label}: an embedding has no input stream to read; write its output "
                "sequentially or its weight with 'delta'"
            )


def _a_matrix_takes_weights(writes: list[WriteNode]) -> Iterator[str]:
    """What a module multiplies by itself has no stream that could be edited."""
    for write in writes:
        if write.site.kind is not SiteKind.MATRIX or write.stage is None:
            continue
        folds = write.stage.on_weight or write.stage is Stage.BIAS
        random = write.algebra is not None and write.algebra.random
        if not folds or write.gated or random:
            yield (
                f"{write.label}: its module ({write.site.module}) multiplies by this matrix "
                "itself, so that only what folds into a weight can be placed here (lora, dora, "
                "oft, 'delta'), without dropout and without a gate; for other techniques select "
                "'ffn', the whole feed-forward part"
            )


def _one_normalisation(writes: list[WriteNode]) -> Iterator[str]:
    """Of two magnitudes over one sum the first has no gradient at all."""
    norms = [write for write in writes if write.stage is Stage.WEIGHT_NORM]
    for index, first in enumerate(norms):
        for second in norms[index + 1 :]:
            apart = (first.site.tensor, first.site.expert) != (
                second.site.tensor, second.site.expert)
            if not apart and overlap(first.site.rows, second.site.rows):
                yield (
                    f"{first.member}.{first.module} and {second.member}.{second.module} both "
                    f"normalise the weight at {first.site.label}: the first magnitude would have "
                    "no effect; keep one of them, or give them different sites"
                )


def _one_base(writes: list[WriteNode]) -> Iterator[str]:
    """What is quantised twice is another weight than either alone."""
    bases = [write for write in writes if write.stage is Stage.WEIGHT_BASE]
    for index, first in enumerate(bases):
        for second in bases[index + 1 :]:
            if overlap(first.site.rows, second.site.rows):
                yield (
                    f"{first.member}.{first.module} and {second.member}.{second.module} both "
                    f"quantise the weight at {first.site.label}; keep one of them"
                )


def _known_width(writes: list[WriteNode]) -> Iterator[str]:
    """A raw module of unknown width cannot be planned from shapes alone."""
    for write in writes:
        if write.stage is not Stage.KEYS_VALUES and write.site.d_out <= 0:
            yield (
                f"{write.label}: the width of module {write.site.module!r} is not known; select "
                "a linear, norm or embedding module"
            )


def _edits_of_norms(writes: list[WriteNode]) -> Iterator[str]:
    """Only tensors that exist can be tuned."""
    for write in writes:
        if write.stage is Stage.BIAS and not write.site.bias:
            yield f"{write.label}: this module has no bias"


def _attention_takes_rows(writes: list[WriteNode]) -> Iterator[str]:
    """Rows enter through transformers' attention interface, where the model calls it."""
    for write in writes:
        shape = write.site.attention
        if write.stage is Stage.KEYS_VALUES and (shape is None or shape.interface is None):
            yield (
                f"{write.label}: this backbone does not call transformers' attention interface, "
                "so keys and values cannot be added; use another technique than prefixes"
            )
        elif write.stage is Stage.KEYS_VALUES and write.kind is not IntegrationKind.CONCAT and (
            shape is not None and not shape.calls_interface
        ):
            yield (
                f"{write.label}: attention over rows alone (integration add) needs a backbone "
                "that calls transformers' attention interface; use concat here"
            )


def _rows_may_stand_there(writes: list[WriteNode]) -> Iterator[str]:
    """A model may look for a token by its id, which the ids of learned rows would mislead."""
    for write in writes:
        if write.stage is Stage.TOKENS and write.site.no_rows:
            yield (
                f"{write.label}: this backbone takes no prompt: {write.site.no_rows}; use prefixes"
            )


def _depends_on_tokens_alone(writes: list[WriteNode]) -> Iterator[str]:
    """Where a module runs on a table as well, that table is of no sample and has no tokens."""
    for write in writes:
        algebra = write.algebra
        by_sample = algebra is not None and (algebra.per_sample or algebra.mixes_tokens)
        if write.site.beyond_tokens and (by_sample or write.positions is not None):
            yield (
                f"{write.label}: this module runs on the table of positions too, where a gate or "
                "a choice of tokens has no meaning; leave it out of the site"
            )


_RULES: tuple[Rule, ...] = (
    _reads_a_stream,
    _one_normalisation,
    _one_base,
    _known_width,
    _a_matrix_takes_weights,
    _edits_of_norms,
    _attention_takes_rows,
    _rows_may_stand_there,
    _depends_on_tokens_alone,
)
