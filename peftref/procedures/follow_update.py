"""The backbone's weight goes along with the low-rank factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FollowUpdate", "FollowUpdateArguments"]


class FollowUpdateArguments(ProcedureArguments):
    """``rate``: lambda; ``begin``: share of the steps before it begins; ``scale``: alpha / r.

    ``module`` has the factors, ``into`` the difference that follows them.
    """

    members: str = ""
    module: str = "delta"
    into: str = "weight"
    rate: float = Field(default=2.0, ge=0.0)
    begin: float = Field(default=0.1, ge=0.0, le=1.0)
    scale: float = 1.0


@procedures.register("follow_update")
class FollowUpdate(Procedure[FollowUpdateArguments]):
    """Delta-LoRA: ``D <- D + rate * scale * (B' A' - B A)`` after each step, ``W' = W + D + ...``.

    ``D`` is a stored difference that no gradient reaches; the backbone itself does not move. Zi
    et al. 2023, https://arxiv.org/abs/2309.02411
    """

    name = "follow_update"
    Arguments = FollowUpdateArguments

    def __init__(self, arguments: FollowUpdateArguments) -> None:
        super().__init__(arguments)
        self._before: dict[str, Tensor] = {}

    def _sites(self, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
        found = adapter.tensors()
        sites: dict[str, dict[str, Tensor]] = {}
        for name, planned in adapter.planned.items():
            if not self.concerns(planned):
                continue
            wanted = {self.arguments.module: ("down.weight", "up.weight"),
                      self.arguments.into: ("followed",)}
            for module, names in wanted.items():
                if planned.spec.name in names and f".{planned.member}.{module}." in name:
                    site = name.removesuffix(planned.spec.name).replace(f".{module}.", ".", 1)
                    sites.setdefault(site, {})[planned.spec.name] = found[name]
        return {n: own for n, own in sites.items() if "followed" in own and "up.weight" in own}

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        self._before = {
            f"{name}.{local}": own[local].detach().clone()
            for name, own in self._sites(adapter).items() for local in ("down.weight", "up.weight")
        }

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        import torch

        a = self.arguments
        if step < round(a.begin * total) or not self._before:
            return
        with torch.no_grad():
            for name, own in self._sites(adapter).items():
                up, down = (self._before[f"{name}.{n}"] for n in ("up.weight", "down.weight"))
                moved = own["up.weight"] @ own["down.weight"] - up @ down
                own["followed"].add_(moved, alpha=a.rate * a.scale)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = {}
