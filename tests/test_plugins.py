"""Artifacts name the plugins that they need and are refused without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import peftref
from peftref.errors import ArtifactError
from peftref.plugins import check_plugins, plugins_of
from peftref.registry import load_plugin, primitives
from tests.backbone.tiny import inputs, tiny

SOURCE = '''
from peftref.ir.primitive import Algebra, Arguments, Primitive, TensorSpec
from peftref.registry import primitives


@primitives.register("plugged")
class Plugged(Primitive[Arguments]):
    """``f(x) = v * x``."""

    name = "plugged"

    def tensors(self):
        return (TensorSpec("level", (self.place.d_in,), "ones"),)

    def algebra(self):
        return Algebra(identity_at_init=True, keeps_zero=True)

    def bind(self, runtime):
        return lambda x, level: x * level
'''
SPEC = """
technique: with_plugin
modules:
  - name: level
    site: {select: ffn}
    function: plugged
    interaction: {insertion: sequential, integration: replace}
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An artifact that uses a plugin; the plugin is loaded."""
    file = tmp_path / "plugged.py"
    file.write_text(SOURCE)
    load_plugin(file)
    adapted = peftref.attach(tiny("bert"), SPEC)
    next(iter(adapted.trainable.values())).data.fill_(2.0)
    return adapted.save(tmp_path / "artifact")


@pytest.fixture(autouse=True)
def _forget():
    yield
    primitives._entries.pop("plugged", None)


def test_an_artifact_names_what_it_uses_of_a_plugin(saved: Path) -> None:
    (plugin,) = json.loads((saved / "peftref.json").read_text())["plugins"]
    assert (plugin["name"], plugin["provides"]) == ("plugged.py", ["primitive plugged"])
    assert len(plugin["version"]) == 12
    model = tiny("bert")
    restored = peftref.restore(model, saved)
    with torch.no_grad():
        changed = model(**inputs("bert")).last_hidden_state
        with restored.disabled():
            assert not torch.allclose(changed, model(**inputs("bert")).last_hidden_state)


def test_without_its_plugin_it_is_refused(saved: Path) -> None:
    held = primitives._entries.pop("plugged")
    with pytest.raises(ArtifactError, match=r"needs plugin 'plugged\.py'.*--plugin"):
        peftref.restore(tiny("bert"), saved)
    primitives._entries["plugged"] = held


def test_another_version_is_told_and_another_plugin_refused(saved: Path) -> None:
    stated = json.loads((saved / "peftref.json").read_text())["plugins"]
    with pytest.warns(UserWarning, match="version 0 of plugin"):
        check_plugins(saved, [{**stated[0], "version": "0"}])
    with pytest.raises(ArtifactError, match=r"here 'plugged\.py'"):
        check_plugins(saved, [{**stated[0], "name": "other.py"}])


def test_what_is_shipped_is_no_plugin() -> None:
    assert plugins_of(peftref.compile("adamix + dora", tiny("bert"))) == []
