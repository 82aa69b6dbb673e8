"""Properties 6 and 9: what is written is read back equal; the same seed gives the same tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given

import peftref
from peftref.compiler import compile_table
from peftref.errors import ArtifactError
from peftref.spec import load, to_yaml
from tests.lowering.randomised import randomise
from tests.properties.backbones import Case, attached, batch, cases, examples, fresh, output, table


@examples(60)
@given(cases())
def test_yaml_is_read_back_equal_and_plans_the_same(case: Case):
    spec = case.composed.spec
    again = load(to_yaml(spec))
    assert again == spec
    assert to_yaml(again) == to_yaml(spec)
    plan, same = compile_table(spec, table(case.family)), compile_table(again, table(case.family))
    assert same.tensors == plan.tensors
    assert str(same) == str(plan)
    assert (same.properties, same.servable) == (plan.properties, plan.servable)
    assert same.cost(64) == plan.cost(64)


@examples(20)
@given(cases())
def test_saved_is_restored_equal(case: Case):
    """Onto the same backbone bit for bit; another one is refused and left as it was."""
    given_batch = batch(case.family)
    with tempfile.TemporaryDirectory() as folder, attached(case, seed=3) as adapted:
        randomise(adapted)
        running = output(adapted.model, given_batch)
        path = adapted.save(Path(folder) / "adapter", note="kept")
        backbone = fresh(case.family)
        restored = peftref.restore(backbone, path)
        assert torch.equal(output(backbone, given_batch), running)
        assert restored.plan.tensors == adapted.plan.tensors
        assert restored.plan.composition == adapted.plan.composition
        assert all(torch.equal(t, adapted.tensors()[n]) for n, t in restored.tensors().items())
        other = fresh(case.family, seed=1)
        kind = type(other)
        with pytest.raises(ArtifactError, match="was trained on backbone"):
            peftref.restore(other, path)
        assert type(other) is kind


DETERMINISTIC = {
    "gpt2": ("lora(rank=2) + prefix_tuning(length=3)", "mix(vera(rank=4), copies=2)",
             "prune(loha(rank=2), criterion='er', keep=0.5)", "prompt_tuning(length=4)"),
    "bert": ("unipelt(hidden=4, length=2, bottleneck=3)", "dora(rank=2) + oft(block=8)",
             "prune(lokr(rank=2), criterion='random', keep=0.3)"),
}
SCRIPT = """
import json, sys
from tests.properties.test_round_trip import fingerprints
print(json.dumps(fingerprints()))
"""


def fingerprints() -> dict[str, float]:
    """Return a sum over all tensors of each composition that no two values leave equal."""
    found: dict[str, float] = {}
    for family, expressions in DETERMINISTIC.items():
        for expression in expressions:
            backbone = fresh(family)
            torch.manual_seed(os.getpid())  # the start must not depend on torch's own generator
            adapted = peftref.attach(backbone, expression, seed=5)
            total = 0.0
            for name, tensor in adapted.tensors().items():
                ranks = torch.arange(1, tensor.numel() + 1, dtype=torch.float64)
                total += len(name) * float((ranks * tensor.detach().double().flatten()).sum())
            found[f"{family}: {expression}"] = total
    return found


def test_two_processes_make_the_same_tensors():
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env=environment, check=True,
                         capture_output=True, text=True)
    assert json.loads(run.stdout) == fingerprints()


def test_another_seed_makes_other_tensors():
    for expression in ("lora(rank=2)", "prefix_tuning(length=3)"):
        first = peftref.attach(fresh("gpt2"), expression, seed=5).tensors()
        second = peftref.attach(fresh("gpt2"), expression, seed=6).tensors()
        drawn = [name for name, tensor in first.items() if bool(tensor.any())]
        assert drawn
        assert not any(torch.equal(first[name], second[name]) for name in drawn)
