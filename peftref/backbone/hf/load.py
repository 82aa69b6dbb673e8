"""Backbones from a folder or a hub name, with the head of a task; never a pickle."""

from __future__ import annotations

import copy
import io
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from peftref.backbone.hf.modules import head_modules
from peftref.backbone.names import resolve_backbone
from peftref.errors import BackboneError

__all__ = ["Task", "load_backbone", "meta_model", "quiet"]

Task = Literal[
    "classification", "regression", "multilabel", "token_classification", "image_classification",
    "causal_lm", "seq2seq_lm", "features",
]
AUTO: Mapping[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "multilabel": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "image_classification": AutoModelForImageClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "features": AutoModel,
}
# Tasks whose head has an output a label, and what transformers calls their loss.
PROBLEMS: Mapping[Task, str] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multilabel": "multi_label_classification",
    "token_classification": "single_label_classification",
    "image_classification": "single_label_classification",
}
# What transformers raises for a wrong name, a damaged file, a wrong shape or a missing package.
FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers from printing warnings and its own progress bars meanwhile."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def meta_model(
    source: str | Path | PreTrainedConfig, task: Task, num_labels: int | None = None
) -> PreTrainedModel:
    """Return the model of ``source`` on the meta device: all shapes, no weights.

    Args:
        source: a folder, a hub name or a configuration.
        task: which head.
        num_labels: for a head with an output a label.

    Raises:
        BackboneError: no such source, or the task does not fit it.
    """
    config = _config(source, task, num_labels)
    with quiet(), torch.device("meta"):
        return _auto(config, task).from_config(config)


def load_backbone(
    source: str | Path, task: Task, num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Return the pretrained model of ``source``, with a new head where the task needs one.

    The new head is drawn from torch's global generator. Weights are read from safetensors files
    or from one GGUF file, which is dequantised. A tensor of the backbone that the source lacks
    is an error, not a random tensor; only a pooler may be new.

    Args:
        source: a folder with ``config.json`` and ``*.safetensors``, one with a ``*.gguf``,
            ``minilm``, or a hub name.
        task: which head.
        num_labels: for a head with an output a label.
        dtype: of the loaded weights.

    Raises:
        BackboneError: no such source, a format that is not read, the wrong task, missing weights.
    """
    source = resolve_backbone(source)
    config = _config(source, task, num_labels)
    auto = _auto(config, task)
    gguf = _gguf(source)
    _refuse_pickle(Path(source))
    format_ = {"gguf_file": gguf.name} if gguf else {"use_safetensors": True}
    # The bar of the GGUF reader goes to standard error whatever the logging settings say.
    bar = redirect_stderr(io.StringIO()) if gguf else nullcontext()
    try:
        with quiet(), bar:
            model, info = auto.from_pretrained(
                str(source), config=config, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True, **format_)
    except FAILURES as error:
        raise BackboneError(f"Cannot load the weights of {str(source)!r}: {_first(error)}") from (
            error)
    _refuse_missing(model, info, str(source))
    return _plain(model, auto) if gguf else model


def _config(
    source: str | Path | PreTrainedConfig, task: Task, num_labels: int | None
) -> PreTrainedConfig:
    if task not in get_args(Task):
        raise BackboneError(f"Unknown task {task!r}. Available: {', '.join(get_args(Task))}")
    labels = 1 if task == "regression" and num_labels is None else num_labels
    if (labels is not None) != (task in PROBLEMS):
        state = "needs" if labels is None else "has no use for"
        raise BackboneError(f"Task {task!r} {state} num_labels (got {num_labels})")
    config = (copy.deepcopy(source) if isinstance(source, PreTrainedConfig)
              else _read_config(resolve_backbone(source)))
    if labels is not None:
        config.num_labels = labels
        setattr(config, "problem_type", PROBLEMS[task])  # noqa: B010 - typed too narrowly
    if task == "causal_lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # else BERT would attend to the tokens that it predicts
    return config


def _read_config(source: str | Path) -> PreTrainedConfig:
    path, gguf = Path(source), _gguf(source)
    if path.is_dir() and gguf is None and not (path / "config.json").is_file():
        raise BackboneError(f"The folder {str(source)!r} has neither a config.json nor a *.gguf "
                            "file, so it is no backbone")
    if not path.is_dir() and (path.is_absolute() or path.exists() or len(path.parts) > 2):
        raise BackboneError(f"There is no folder {str(source)!r}; a backbone is a folder with "
                            "config.json and *.safetensors (or a *.gguf file), or a hub name")
    options = {"gguf_file": gguf.name} if gguf else {}
    try:
        with quiet():
            return AutoConfig.from_pretrained(str(source), **options)
    except FAILURES as error:
        known = "" if path.is_dir() else "no folder of that name, and the hub did not give it: "
        raise BackboneError(f"Cannot read the backbone {str(source)!r}: {known}"
                            f"{_first(error)}") from error


def _gguf(source: str | Path) -> Path | None:
    files = sorted(Path(source).glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BackboneError(f"The folder {str(source)!r} has several GGUF files; keep one of "
                            f"{names}")
    return files[0] if files else None


def _auto(config: PreTrainedConfig, task: Task) -> Any:  # noqa: ANN401 - transformers' factories
    auto = AUTO[task]
    if type(config) in auto._model_mapping:  # noqa: SLF001 - there is no public question
        return auto
    fitting = [name for name, each in AUTO.items()
               if type(config) in each._model_mapping]  # noqa: SLF001
    raise BackboneError(f"Model type {config.model_type!r} has no model for task {task!r}. "
                        f"It fits: {', '.join(fitting) or 'none'}")


def _refuse_pickle(path: Path) -> None:
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.gguf")):
        return
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
    if pickles:
        raise BackboneError(
            f"The folder {str(path)!r} has its weights as a pickle ({pickles[0]}), which can run "
            "code when it is read. Convert it to safetensors: load it where you trust it and call "
            "save_pretrained")
    raise BackboneError(f"The folder {str(path)!r} has no weights: no *.safetensors, no *.gguf")


def _refuse_missing(model: PreTrainedModel, info: Mapping[str, Any], source: str) -> None:
    heads = head_modules(model)
    changed = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    lost = sorted(name for name in {*info["missing_keys"], *changed}
                  if name.split(".")[0] not in heads and "pooler" not in name.split("."))
    if lost:
        raise BackboneError(
            f"The weights of {source!r} do not fill {type(model).__name__}: {len(lost)} tensors "
            f"are missing or of another shape, such as {', '.join(lost[:3])}")


def _plain(model: PreTrainedModel, auto: Any) -> PreTrainedModel:  # noqa: ANN401
    """Return an ordinary model with these weights: one read from GGUF refuses to be saved."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with quiet():
        plain = auto.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain.to(model.dtype).eval()


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
