"""An artifact folded into its backbone: a checkpoint that loads without peftref."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from peftref.adapted import Adapted
from peftref.artifact import replaced_folder
from peftref.backbone import hf
from peftref.errors import ArtifactError
from peftref.training.restore import Opened

__all__ = ["check_empty", "write_merged"]

HEAD_FILE = "classification_head.safetensors"
README = """# Merged encoder with a {pooling}-pooled classification head

`AutoModel` loads the encoder. transformers has no class for a head on the {words}, so
`{file}` holds its linear layer:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder = AutoModel.from_pretrained(folder).eval()
head = load_file(folder + "/{file}")
batch = tokenizer(["a text"], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = encoder(**batch).last_hidden_state
{formula}
scores = pooled @ head["weight"].T + head["bias"]
```

Classes, in order of the scores: {labels}
"""
FORMULAS = {
    "mean": '''mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
pooled = (hidden * mask).sum(1) / mask.sum(1)''',
    "cls": "pooled = hidden[:, 0]",
}


def check_empty(output: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        ArtifactError: it does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArtifactError(f"{output} exists and is not empty; name another output")


def write_merged(opened: Opened, output: Path) -> str:
    """Merge and write a plain checkpoint; return what was written, as a sentence.

    Args:
        opened: an artifact on its backbone.
        output: a new folder.

    Raises:
        MergeError: the composition cannot be folded; the message lists why.
        ArtifactError: the folder is taken.
    """
    check_empty(output)
    if isinstance(opened.adapted, Adapted):
        opened.adapted.merge()
    model, pooling = opened.model, opened.head.pooling
    with hf.quiet(), replaced_folder(output) as folder:
        opened.tokenizer.save_pretrained(folder)
        if pooling not in ("mean", "cls") or hasattr(model.config, "classifier_pooling"):
            model.save_pretrained(folder)
            return f"{type(model).__name__}.from_pretrained loads it without peftref"
        if not opened.adapted.head:  # vectors of texts: the encoder is all that there is
            model.save_pretrained(folder)
            return f"AutoModel loads it without peftref; its vectors are {pooling}-pooled"
        classifier = getattr(model, "classifier", None)
        if not isinstance(classifier, nn.Linear) or len(opened.adapted.head) > 2:
            raise ArtifactError(
                f"the head of {type(model).__name__} on {pooling} pooling is no single linear "
                "layer and has no form that transformers loads; keep the artifact"
            )
        cast("PreTrainedModel", model.base_model).save_pretrained(folder)
        _write_head(folder, classifier, pooling, opened.head.label_names)
    return (
        f"AutoModel loads the encoder without peftref; its {pooling}-pooled head is the linear "
        f"layer in {HEAD_FILE}, and README.md has the lines that apply it"
    )


def _write_head(
    folder: Path, classifier: nn.Linear, pooling: str, labels: tuple[str, ...]
) -> None:
    tensors = {"weight": classifier.weight, "bias": classifier.bias}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, folder / HEAD_FILE, metadata={"format": "pt"})
    words = "mean of the tokens" if pooling == "mean" else "first token itself"
    text = README.format(
        pooling=pooling, words=words, file=HEAD_FILE, formula=FORMULAS[pooling],
        labels=", ".join(labels) or "one quantity",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
