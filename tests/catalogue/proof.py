"""What the proof of a catalogue entry is made of; every test of ``tests/catalogue`` uses it.

Models are the tiny ones of ``tests/backbone/tiny.py`` in float64. A plain definition is a function
of the backbone's weight and the adapter's tensors, written from the formula in the test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import peft
import torch
from scipy import stats
from torch import Tensor, nn

import peftref
from peftref.adapted import Adapted
from peftref.ir.edits import EditPlan
from peftref.lowering.weight import dense_weight
from tests.backbone.tiny import Task, inputs, tiny
from tests.parity.peft_pairs import gradients, logits, peft_model, perturb

__all__ = ["TASKS", "assert_follows", "assert_identity", "assert_known_maps",
           "assert_known_outputs", "assert_known_weights", "assert_merges", "assert_reached",
           "assert_same_as_peft", "attach", "batch", "count", "initial", "local_tensors"]

TASKS: Mapping[str, Task] = {
    "bert": "classification", "roberta": "classification", "distilbert": "classification",
    "gpt2": "causal_lm", "gpt_neox": "causal_lm", "llama": "causal_lm", "qwen3": "causal_lm",
    "t5": "seq2seq_lm"}

Tensors = Mapping[str, Tensor]
WeightForm = Callable[[Tensor, Tensors], Tensor]
"""``(W, tensors) -> W'``, both (d_out, d_in)."""
MapForm = Callable[[Tensor, Tensor, Tensors], Tensor]
"""``(x, y, tensors) -> y'`` with ``y`` the frozen output of the module at ``x``."""
Counterpart = tuple[nn.Parameter, Callable[[Tensor], Tensor]]
"""PEFT's parameter for one of our tensors, and how ours is laid out there."""


def attach(expression: str, family: str = "bert", *, moved: bool = True, size: float = 0.3,
           seed: int = 0, **changes: object) -> Adapted:
    """Attach to a tiny float64 model; ``moved``: every trained tensor is away from its start."""
    model = tiny(family, TASKS[family], dtype=torch.float64, **changes)
    adapted = peftref.attach(model, expression, seed=seed)
    if moved:
        perturb(adapted, size)
    return adapted


def batch(family: str = "bert") -> dict[str, Tensor]:
    """Return inputs of a tiny model."""
    return inputs(family, TASKS[family])


def count(expression: str, family: str = "bert", **changes: object) -> int:
    """Return the number of trained parameters that the plan states, checked against torch's."""
    adapted = attach(expression, family, moved=False, **changes)
    stated = adapted.plan.trainable_parameters
    found = sum({id(p): p.numel() for p in adapted.trainable.values()}.values())
    assert stated == found, (stated, found)
    return stated


def initial(expression: str, ending: str, family: str = "bert", *, seed: int = 0,
            **changes: object) -> Tensor:
    """Return all first values of the tensors whose names end so, side by side."""
    adapted = attach(expression, family, moved=False, seed=seed, **changes)
    found = [t.detach().flatten() for n, t in adapted.tensors().items() if n.endswith(ending)]
    assert found, (ending, list(adapted.tensors()))
    return torch.cat(found)


def assert_follows(values: Tensor, distribution: stats.rv_frozen) -> None:
    """Kolmogorov-Smirnov: at this level a right sampler fails once in ten thousand seeds."""
    assert stats.kstest(values.double().numpy(), distribution.cdf).pvalue > 1e-4
    low, high = distribution.support()
    assert low <= values.min()
    assert values.max() <= high


def assert_identity(expression: str, family: str = "bert", *, exact: bool = True) -> None:
    """The plan's claim about the first output is ``exact``, and it is true of that output."""
    adapted = attach(expression, family, moved=False)
    found = logits(adapted.model, batch(family))
    with adapted.disabled():
        difference = (found - logits(adapted.model, batch(family))).abs().max().item()
    assert adapted.plan.properties.identity_at_init is exact
    # Rounding only: terms cancel or are zero, but sums are taken in other orders.
    assert difference <= 1e-11 if exact else difference > 1e-9


def local_tensors(adapted: Adapted, edit: EditPlan) -> dict[str, Tensor]:
    """Return the tensors of one edit by their names inside the technique's module."""
    names = {t.name: t.spec.name for t in adapted.plan.tensors}
    everything = adapted.tensors()
    return {names[n]: everything[n] for n in edit.program.tensors}


def _sites(adapted: Adapted) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Each adapted module with all tensors of its edits; names clash only by mistake."""
    for planned in adapted.plan.modules:
        tensors: dict[str, Tensor] = {}
        for edit in planned.edits:
            own = local_tensors(adapted, edit)
            assert not tensors.keys() & own.keys(), "name the tensors apart"
            tensors.update(own)
        yield planned.path, adapted.model.get_submodule(planned.path), tensors


def _compare(adapted: Adapted, module: nn.Module, tensors: Tensors, plain: MapForm,
             path: str, tolerance: float) -> None:
    """Output and every gradient of one module against the plain definition."""
    weight = dense_weight(module).detach()
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 5, weight.shape[1], generator=generator, dtype=torch.float64)
    bias = getattr(module, "bias", None)
    with adapted.disabled():
        frozen = module(x).detach()
    assert torch.allclose(frozen, nn.functional.linear(x, weight, bias))
    trained = [t for t in tensors.values() if t.requires_grad]
    results: list[tuple[Tensor, ...]] = []
    for y in (module(x), plain(x, frozen, tensors)):
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad((y * weights).sum(), trained)))
    assert (results[1][0] - frozen).abs().max() > 1e-6, f"{path}: the adapter does nothing"
    for ours, expected in zip(*results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale, msg=path)


def assert_known_maps(adapted: Adapted, plain: MapForm, *, tolerance: float = 1e-10) -> None:
    """Each adapted linear gives ``plain(x, y, tensors)`` and its gradients."""
    for path, module, tensors in _sites(adapted):
        _compare(adapted, module, tensors, plain, path, tolerance)


def assert_known_weights(adapted: Adapted, plain: WeightForm, *, merges: bool = True,
                         tolerance: float = 1e-10) -> None:
    """Each adapted linear runs with ``plain(W, tensors)``; merged, it holds that weight."""
    expected: dict[str, Tensor] = {}
    for path, module, tensors in _sites(adapted):
        weight = dense_weight(module).detach()
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()

        def run(x: Tensor, y: Tensor, tensors: Tensors, w: Tensor = weight,
                b: Tensor | None = bias) -> Tensor:
            return nn.functional.linear(x, plain(w, tensors), b)

        _compare(adapted, module, tensors, run, path, tolerance)
        expected[path] = plain(weight, tensors).detach()
    assert adapted.plan.properties.mergeable is merges
    if not merges:
        return
    adapted.merge()
    for path, weight in expected.items():
        merged = dense_weight(adapted.model.get_submodule(path))
        torch.testing.assert_close(merged, weight, rtol=0, atol=tolerance, msg=path)
    adapted.unmerge()


def assert_known_outputs(adapted: Adapted, expected: Tensor, family: str = "bert", *,
                         tolerance: float = 1e-10) -> None:
    """The model's logits are those of a plain model written in the test."""
    found = logits(adapted.model, batch(family))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def assert_merges(adapted: Adapted, family: str = "bert", *, tolerance: float = 1e-10) -> None:
    """Merged and unmerged logits agree, and the backbone comes back bit for bit."""
    assert adapted.plan.properties.mergeable
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    expected = logits(adapted.model, batch(family))
    adapted.merge()
    found = logits(adapted.model, batch(family))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    adapted.unmerge()
    for name, parameter in adapted.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def assert_reached(expression: str, family: str = "bert", *, steps: int = 3,
                   except_for: tuple[str, ...] = ()) -> None:
    """Every trained tensor gets a gradient within a few steps from its first values."""
    adapted = attach(expression, family, moved=False)
    adapted.setup_without_data()
    optimiser = torch.optim.SGD(adapted.trainable.values(), lr=0.05)
    seen: set[str] = set()
    for _ in range(steps):
        found = gradients(adapted.model, batch(family), adapted.trainable)
        for name, parameter in adapted.trainable.items():
            parameter.grad = found[name]
            if found[name].abs().max() > 1e-12:
                seen.add(name)
        optimiser.step()
    missed = [n for n in adapted.trainable if n not in seen and not n.endswith(except_for or "-")]
    assert not missed, missed


def assert_same_as_peft(  # noqa: PLR0913 - one keyword for each way to differ
    family: str, expression: str, config: peft.PeftConfig,
    names: Callable[[nn.Module, str], Mapping[str, Counterpart]], *,
    merges: bool = True, tolerance: float = 1e-10, size: float = 0.3,
    dtype: torch.dtype = torch.float64, same_gradients: bool = True,
) -> None:
    """Same logits, same gradients, same merged logits as PEFT with the same tensors.

    Args:
        family: of the tiny backbone.
        expression: ours.
        config: PEFT's.
        names: ``(their module, its path) -> {our local name: (their tensor, layout)}``; layout
            turns our tensor (and its gradient) into theirs.
        merges: whether both merge.
        tolerance: absolute, in float64; above 1e-10 only where PEFT computes in float32.
        size: of the random move away from the first values.
        dtype: of the backbone while PEFT starts its tensors; the tiny weights fit float32.
        same_gradients: whether PEFT's gradients are those of what it computes.
    """
    backbone = tiny(family, TASKS[family], dtype=torch.float64)
    theirs = peft_model(copy.deepcopy(backbone).to(dtype), config).double()
    ours = peftref.attach(backbone, expression)
    perturb(ours, size)
    pairs: dict[str, Counterpart] = {}
    full = ours.tensors()
    with torch.no_grad():
        for planned in ours.plan.modules:
            layer = theirs.get_submodule(f"base_model.model.{planned.path}")
            for local, pair in names(layer, planned.path).items():
                own = [n for edit in planned.edits for n in edit.program.tensors
                       if n == local or n.endswith(f".{local}")]
                assert len(own) == 1, (local, own)
                pairs[own[0]] = pair
                pair[0].copy_(pair[1](full[own[0]]).reshape(pair[0].shape))
    assert ours.trainable.keys() <= pairs.keys(), ours.trainable.keys() - pairs.keys()
    rows = batch(family)
    expected = logits(theirs, rows)
    close = {"rtol": 0, "atol": tolerance}
    with ours.disabled():
        assert (logits(ours.model, rows) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours.model, rows), expected, **close)
    trained = {n: pairs[n][0] for n in ours.trainable} if same_gradients else {}
    reference = gradients(theirs, rows, trained) if trained else {}
    found = gradients(ours.model, rows, ours.trainable)
    for name, gradient in found.items() if trained else ():
        laid = pairs[name][1](gradient).reshape(reference[name].shape)
        scale = max(1.0, float(reference[name].abs().max()))
        torch.testing.assert_close(laid, reference[name], rtol=0, atol=tolerance * scale, msg=name)
    if merges:
        ours.merge()
        torch.testing.assert_close(logits(ours.model, rows), expected, **close)
