"""A loss that makes the activations of feed-forward parts sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import CompositionError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Density", "DensityArguments"]

_ROLE = "ffn.down"


class DensityArguments(ProcedureArguments):
    """``weight``: of the loss; ``epsilon``: of the smooth count; ``threshold``: of `measure`."""

    weight: float = Field(default=1.0, ge=0.0)
    epsilon: float = Field(default=1e-7, gt=0.0)
    threshold: float = Field(default=0.01, ge=0.0)


@procedures.register("density")
class Density(Procedure[DensityArguments]):
    """``weight`` times the smooth share of activations that are not zero.

    For what enters the last linear ``ffn.down`` of each layer, ``a^2 / (a^2 + epsilon)``, averaged
    over units and real tokens of a sample, over samples and over the layers of a stack; an
    encoder and a decoder add up. DEFT, Runwal et al. 2025, https://arxiv.org/abs/2402.01911
    """

    name = "density"
    Arguments = DensityArguments

    def __init__(self, arguments: DensityArguments) -> None:
        super().__init__(arguments)
        self._sites: list[tuple[str, nn.Module]] = []
        self._seen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    @property
    def per_step(self) -> bool:
        return self.arguments.weight > 0

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        self._find(adapter)

    def _find(self, adapter: Adapter) -> None:
        sites = [site for site in adapter.plan.table if site.role == _ROLE]
        if not sites:
            raise CompositionError(
                f"density: this backbone has no site {_ROLE}, whose input is the activation of "
                "the feed-forward part"
            )
        self._sites = [(site.stack, adapter.model.get_submodule(site.module)) for site in sites]

    def _watch(self) -> None:
        self._release()
        for index, (_, module) in enumerate(self._sites):
            def keep(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                # A whole sub-layer's adapter hands a second tensor in beside the activation.
                self._seen[index] = getattr(args[0], "value", args[0])

            self._hooks.append(module.register_forward_pre_hook(keep))

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        if self.arguments.weight > 0:
            self._find(adapter)
            self._watch()

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        self._release()

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        if self.arguments.weight == 0.0:
            return None
        epsilon = self.arguments.epsilon
        return self.arguments.weight * self._mean(inputs, lambda a: a**2 / (a**2 + epsilon))

    def _mean(self, inputs: Mapping[str, Any], of: Callable[[Tensor], Tensor]) -> Tensor:
        import torch

        stacks: dict[str, list[Tensor]] = {}
        for index, (stack, _) in enumerate(self._sites):
            activation = self._seen[index]
            value = of(activation).mean(-1)
            mask = _real_tokens(inputs, stack, value)
            if mask is None:
                share = value.flatten(1).mean(1) if value.dim() > 1 else value
            else:
                share = (value * mask).sum(1) / mask.sum(1).clamp(min=1)
            stacks.setdefault(stack, []).append(share.mean())
        self._seen = {}
        return torch.stack([torch.stack(each).mean() for each in stacks.values()]).sum()

    def measure(
        self, adapter: Adapter, batches: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return the share of activations that are not zero, outside training.

        ``exact`` counts what is not zero; ``thresholded`` what is above ``threshold`` in size,
        which falls also where an activation (GELU) is never exactly zero.
        """
        import torch

        totals, count = {"exact": 0.0, "thresholded": 0.0}, 0
        limits = {"exact": 0.0, "thresholded": self.arguments.threshold}
        with self._watched(adapter), torch.no_grad():
            for batch in batches:
                adapter.model(**batch)
                seen = dict(self._seen)
                for name, limit in limits.items():
                    self._seen = dict(seen)
                    totals[name] += float(self._mean(
                        batch, lambda a, limit=limit: (a.abs() > limit).to(a.dtype)))
                count += 1
        stacks = len({stack for stack, _ in self._sites})
        return {name: total / max(count, 1) / stacks for name, total in totals.items()}

    @contextmanager
    def _watched(self, adapter: Adapter) -> Iterator[None]:
        training = adapter.model.training
        adapter.model.eval()
        self._find(adapter)
        self._watch()
        try:
            yield
        finally:
            self._release()
            adapter.model.train(training)


def _real_tokens(inputs: Mapping[str, Any], stack: str, value: Tensor) -> Tensor | None:
    """The padding mask of the batch, where it is that of these tokens."""
    both = "decoder_input_ids" in inputs or "decoder_attention_mask" in inputs
    name = "decoder_attention_mask" if stack == "decoder" and both else "attention_mask"
    mask = inputs.get(name)
    if mask is None or tuple(mask.shape) != tuple(value.shape):
        return None
    return mask.to(value.dtype)
