"""Artifact folders that are damaged, foreign or meant to do harm: one ArtifactError."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import peftref
from peftref.artifact import read
from peftref.errors import ArtifactError
from tests.backbone.tiny import tiny
from tests.hostile.cases import Case, each, tried

INFO, TENSORS = "peftref.json", "adapter_model.safetensors"
QUERY = "encoder.layer.0.attention.self.query.lora.delta.down.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("bert")


@pytest.fixture(scope="module")
def good(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapted = peftref.attach(model, "lora(rank=2)")
    path = adapted.save(tmp_path_factory.mktemp("hostile") / "good")
    adapted.detach()
    return path


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(good, tmp_path / "bad")
    yield tmp_path / "bad"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def stated(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        info = json.loads((folder / INFO).read_text())
        (folder / INFO).write_text(json.dumps({**info, **changes}))

    return damage


def written(content: bytes, name: str = INFO) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Change the tensors, and what peftref.json says of them accordingly."""

    def damage(folder: Path) -> None:
        held = load_file(folder / TENSORS)
        change(held)
        save_file(held, folder / TENSORS, metadata={"format": "pt"})
        stated(tensors={name: list(each.shape) for name, each in held.items()})(folder)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / TENSORS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        told = json.loads(content[8:8 + length])
        change(told)
        text = json.dumps(told).encode()
        (folder / TENSORS).write_bytes(
            struct.pack("<Q", len(text)) + text + content[8 + length:])

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def filled(value: float) -> Damage:
    return tensors(lambda held: held[QUERY].fill_(value))


def of_type(dtype: torch.dtype) -> Damage:
    return tensors(lambda held: held.update({QUERY: held[QUERY].to(dtype)}))


def duplicate(folder: Path) -> None:
    text = (folder / INFO).read_text().rstrip().removesuffix("}")
    (folder / INFO).write_text(text + ', "seed": 1}')


def cut(folder: Path) -> None:
    """As a kill between the two files leaves it: tensors whole, the description begun."""
    (folder / INFO).write_text((folder / INFO).read_text()[:80])


DAMAGES = [
    Case("JSON that is a list", "must hold a JSON object", written(b"[]")),
    Case("JSON nested 100,000 deep", "nested too deep", written(b"[" * 100_000)),
    Case("JSON with a number of 5,000 digits", "not whole JSON",
         written(b'{"format": ' + b"1" * 5000 + b"}")),
    Case("JSON with a duplicate key", "the key 'seed' occurs twice", duplicate),
    Case("JSON with NaN", "NaN is no number", stated(seed=float("nan"))),
    Case("JSON that is not UTF-8", "not whole JSON", written(b"\xff\xfe{}")),
    Case("JSON of 64 MB", "no artifact needs that",
         lambda folder: os.truncate(folder / INFO, (1 << 26) + 1)),
    Case("half-written JSON", "not whole JSON", cut),
    Case("no JSON: killed between the two files", "no peftref artifact",
         lambda folder: (folder / INFO).unlink()),
    Case("no tensors", "has no adapter_model", lambda folder: (folder / TENSORS).unlink()),
    Case("a format from the future", "format 2 is not known", stated(format=2)),
    Case("true for a format", "format True is not known", stated(format=True)),
    Case("a seed that is text", "seed: Input should be a valid integer", stated(seed="x")),
    Case("a seed of 4,000 digits", "below 2**63", stated(seed=10**4000)),
    Case("a backbone that is a list", "backbone: ", stated(backbone=[])),
    Case("a hash that is a number", "backbone.hash: ", stated(backbone={"hash": 3})),
    Case("tensors that are a number", "tensors: ", stated(tensors=3)),
    Case("metadata that are text", "metadata: ", stated(metadata="x")),
    Case("plugins that are null", "plugins: ", stated(plugins=None)),
    Case("a plugin entry without names", "'version' is missing",
         stated(plugins=[{"name": "x", "provides": 3}])),
    Case("a plugin entry that asks for a module", "never loads code by itself",
         stated(plugins=[{"name": "os", "version": "1", "provides": ["primitive os.system"]}])),
    Case("a plugin entry that claims what is shipped", "'peftref' provides it",
         stated(plugins=[{"name": "x", "version": "1", "provides": ["primitive linear"]}])),
    Case("a site row that is none", "site row is wrong", stated(sites={"families": 3})),
    Case("a composition that is a name", "composition: ", stated(composition="lora")),
    Case("a composition that uses a file elsewhere", "the composition is wrong",
         stated(composition={"composition": "x", "members": [{"use": "'/etc/hostname'"}]})),
    Case("weights of another backbone", "was trained on backbone",
         stated(backbone={"hash": "sha256:00"})),
    Case("an empty tensor file", "may be truncated", written(b"", TENSORS)),
    Case("a garbage tensor file", "may be truncated", written(bytes(range(256)) * 20, TENSORS)),
    Case("a truncated tensor file", "may be truncated",
         lambda folder: written((folder / TENSORS).read_bytes()[:-10], TENSORS)(folder)),
    Case("bytes behind the tensors", "may be truncated",
         lambda folder: written((folder / TENSORS).read_bytes() + b"x" * 99, TENSORS)(folder)),
    Case("a header that claims 2**62 bytes", "header too large",
         written(struct.pack("<Q", 1 << 62) + b"{}", TENSORS)),
    Case("a header that claims 99 MB", "may be truncated",
         written(struct.pack("<Q", 99_000_000) + b"{}", TENSORS)),
    Case("a shape of 2**80 numbers", "may be truncated",
         header(lambda told: told[QUERY].update(shape=[1 << 40, 1 << 40]))),
    Case("offsets that overlap", "may be truncated",
         header(lambda told: told[QUERY].update(data_offsets=[0, 4]))),
    Case("a type that there is not", "may be truncated",
         header(lambda told: told[QUERY].update(dtype="F99"))),
    Case("../ in the name of a tensor", "'../../x' differs",
         header(lambda told: told.update({"../../x": told.pop(QUERY)}))),
    Case("an extra tensor", "tensors do not fit this model",
         tensors(lambda held: held.update(extra=torch.ones(2)))),
    Case("a missing tensor", "tensors do not fit this model",
         tensors(lambda held: held.pop(QUERY))),
    Case("a tensor of another shape", "has shape (1, 1)",
         tensors(lambda held: held.update({QUERY: torch.ones(1, 1)}))),
    Case("integers for a trained tensor", "type torch.int64", of_type(torch.int64)),
    Case("complex numbers for a trained tensor", "type torch.complex64", of_type(torch.complex64)),
    Case("NaN in a tensor", "no finite numbers", filled(float("nan"))),
    Case("infinity in a tensor", "no finite numbers", filled(float("inf"))),
    Case("a head tensor with the name of a backbone weight", "the model's: none",
         tensors(lambda held: held.update(
             {"head/embeddings.word_embeddings.weight": torch.zeros(97, 32)}))),
    Case("JSON that is a link out of the folder", "leads out of the folder",
         link(INFO, "/etc/hostname")),
    Case("tensors that are a link to ../", "leads out of the folder",
         link(TENSORS, "..")),
    Case("JSON that is a link to a device", "leads out of the folder", link(INFO, "/dev/zero")),
    Case("JSON that is a link to itself", "cannot be read", link(INFO, INFO)),
    Case("JSON that is a folder", "not a regular file",
         lambda folder: ((folder / INFO).unlink(), (folder / INFO).mkdir())),
]


@each("artifact", DAMAGES)
def test_a_damaged_folder_is_refused(
    case: Case, folder: Path, model: PreTrainedModel
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = type(model.base_model)
    case.made(folder)
    with pytest.raises(ArtifactError) as raised:
        peftref.restore(model, folder)
    assert case.says in str(raised.value)
    # The refused folder left nothing on the model.
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(model.base_model) is kind


@tried("artifact", "another family of backbone, the check of its weights skipped",
       "refused: its tensors do not fit")
def test_another_family_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="do not fit this model"):
        peftref.restore(tiny("llama"), folder, check_backbone=False)


@tried("artifact", "pickle files beside the tensors", "never opened; the artifact loads")
def test_pickles_are_never_opened(
    folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "head.pt"):
        (folder / name).write_bytes(b"cposix\nabort\n(tR.")  # ends the process when unpickled
    opened: list[str] = []
    real = Path.open

    def watched(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    peftref.restore(model, folder).detach()
    assert opened == [INFO]


@tried("artifact", "a folder of links, as a hub's cache keeps it", "read")
def test_the_links_of_a_hub_cache_are_followed(good: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate((INFO, TENSORS)):
        shutil.copy(good / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert read(snapshot).tensors.keys() == read(good).tensors.keys()


PLACES = [
    Case("no folder", "no such folder", "nothing"),
    Case("a path too long for any file", "cannot be read", "x" * 5000),
    Case("a path with a NUL", "no such folder", "a\0b"),
]


@each("artifact path", PLACES)
def test_a_wrong_path_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as raised:
        read(tmp_path / case.made)
    assert case.says in str(raised.value)
