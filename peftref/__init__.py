"""Parameter-efficient fine-tuning techniques, composed, compiled and searched.

    spec    = peftref.load("lora(rank=8) + prefix_tuning")
    plan    = peftref.compile(spec, model)
    adapted = peftref.attach(model, plan)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftref.adapted import Adapted
    from peftref.compiler import attach, compile, restore  # noqa: A004
    from peftref.errors import PeftRefError
    from peftref.ir.plan import Plan
    from peftref.registry import load_plugin
    from peftref.search.combine import combine
    from peftref.spec import load
    from peftref.training.laplace import laplace
    from peftref.training.restore import from_pretrained
    from peftref.training.trainer import trainer

__version__ = "0.1.0"

_EXPORTS = {
    "Adapted": "peftref.adapted",
    "PeftRefError": "peftref.errors",
    "Plan": "peftref.ir.plan",
    "attach": "peftref.compiler",
    "combine": "peftref.search.combine",
    "compile": "peftref.compiler",
    "from_pretrained": "peftref.training.restore",
    "laplace": "peftref.training.laplace",
    "load": "peftref.spec",
    "load_plugin": "peftref.registry",
    "restore": "peftref.compiler",
    "trainer": "peftref.training.trainer",
}

__all__ = [
    "Adapted",
    "PeftRefError",
    "Plan",
    "attach",
    "combine",
    "compile",
    "from_pretrained",
    "laplace",
    "load",
    "load_plugin",
    "restore",
    "trainer",
]


def __getattr__(name: str) -> object:
    # Lazy, so that reading specs does not import torch.
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'peftref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
