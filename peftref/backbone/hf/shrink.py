"""A small random model of a backbone's own class, on which its structure can be tried out."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftref.backbone.hf.modules import named_modules
from peftref.errors import BackboneError

__all__ = ["base_model", "example_inputs", "outline", "small_model"]

LAYERS, VOCABULARY, HEAD_WIDTH, LARGEST = 2, 128, 8, 60_000_000
_LAYER_COUNTS = re.compile(r"(num_|n_)?((encoder|decoder|hidden)_)?layers?")
_WIDTHS = re.compile(
    r"(.*_)?(dim|d_model|d_kv|d_ff|n_embd|n_inner|hidden_size|intermediate_size|embedding_size"
    r"|output_size)")
_TOKENS = re.compile(r".*_token_id")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
ROWS, TOKENS, DECODER_TOKENS = 2, 7, 5  # different lengths tell the two sides apart


def outline(model: nn.Module, inside: str = "") -> dict[str, str]:
    """Return the class of every module below ``inside`` by path, indices written ``*``."""
    return {_INDEX.sub("*", path.removeprefix(inside)): type(module).__name__
            for path, module in named_modules(model).items() if path.startswith(inside)}


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its task head: itself, where it has none."""
    return cast("PreTrainedModel", model.base_model)


def small_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a random model of the class of the base model: two layers, narrow, few words.

    Head counts stay, since the layout of fused projections depends on them; widths are divided by
    one number. What is small already stays as it is.

    Raises:
        BackboneError: no such model can be made, or it has other modules than the real one.
    """
    base = base_model(model)
    kind: type[PreTrainedModel] = getattr(type(base), "peftref_base", type(base))
    try:
        small = _built(kind, _small_config(base.config))
    except Exception as error:
        raise BackboneError(f"no small {kind.__name__} can be made to try out: {error}") from error
    missing = sorted(outline(base).keys() - outline(small).keys())
    if missing:
        raise BackboneError(f"a small {kind.__name__} lacks {', '.join(missing[:5])}")
    return small


def _built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise BackboneError(f"two layers of it have {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        built = kind(config).float().eval()
        with torch.no_grad():
            # At their initial values norms and biases would be without effect.
            for parameter in built.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return built


def _small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    heads = getattr(small, "num_attention_heads", None)
    hidden = getattr(small, "hidden_size", None)
    factor = 1
    if isinstance(heads, int) and isinstance(hidden, int):
        width = getattr(small, "head_dim", None) or hidden // heads
        factor = max(width // HEAD_WIDTH, 1)
    for name, value in vars(config).items():
        # A value that several names share is set under each of them.
        made = _small_value(name, value, factor)
        if made is not value:
            setattr(small, name, made)
    return small


def _small_value(name: str, value: Any, factor: int) -> Any:  # noqa: ANN401 - any configuration
    if name == "layer_types" and isinstance(value, list):
        return value[:LAYERS]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _LAYER_COUNTS.fullmatch(name):
        return min(value, LAYERS)
    if name.endswith("vocab_size"):
        return min(value, VOCABULARY)
    if _TOKENS.fullmatch(name):
        return value if value < VOCABULARY else 0
    if _WIDTHS.fullmatch(name) and value % factor == 0:
        return value // factor
    return value


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs of the kind that ``model`` takes: token ids or an image.

    Raises:
        BackboneError: it takes something else.
    """
    generator = torch.Generator().manual_seed(0)
    config, main = model.config, model.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        edges = (size, size) if isinstance(size, int) else size
        if isinstance(edges, list | tuple) and len(edges) == 2:
            channels = getattr(config, "num_channels", 3)
            shape = (ROWS, channels, *edges)
            return {"pixel_values": torch.randn(shape, generator=generator)}
    if main != "input_ids":
        raise BackboneError(f"it takes {main!r}, and only token ids and images can be tried out")
    special = {value for name, value in config.to_dict().items() if _TOKENS.fullmatch(name)}
    words = [word for word in range(3, config.vocab_size) if word not in special]

    def ids(length: int) -> Tensor:
        chosen = torch.randint(len(words), (ROWS, length), generator=generator)
        return torch.tensor(words)[chosen]

    made = {"input_ids": ids(TOKENS), "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long)}
    if _reads_decoder_ids(model):
        made["decoder_input_ids"] = ids(DECODER_TOKENS)
    return made


def _reads_decoder_ids(model: PreTrainedModel) -> bool:
    names: Mapping[str, object] = inspect.signature(type(model).forward).parameters
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in names
