"""Training in parts: schedule, optimiser, what rests, what goes back, and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

import peftref
from peftref.errors import CompositionError, TrainingError
from peftref.procedures.phases import Part, Phases, PhasesArguments
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.encode import Collator
from tests.backbone.tiny import tiny
from tests.training.assets import bert_folder
from tests.training.test_trainer import ROWS, arguments

PARTS: list[dict[str, Any]] = [
    {"name": "down", "share": 1, "train": ["lora:down.weight"]},
    {"name": "both", "share": 2, "rate": 0.5, "rewind": ["lora:down.weight", "head"]},
    {"name": "again", "share": 1, "rewind": ["*"], "to": "both", "train": ["lora", "head"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("model") / "bert", dropout=0.1)


def composition(parts: list[dict[str, Any]] = PARTS) -> dict[str, Any]:
    return {"composition": "parts", "members": [{"name": "lora", "use": "lora"}],
            "procedures": [{"phases": parts}]}


class Watch(TrainerCallback):
    """Notes rates, values and optimiser state before every step, and after the last."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.rates: list[float] = []
        self.values: list[dict[str, Tensor]] = []
        self.moments: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        self.moments.append(len(kwargs["optimizer"].state))
        self.note()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()

    def note(self) -> None:
        held = {**self.made.trainable, **self.made.head}
        self.values.append({name: value.detach().clone() for name, value in held.items()})


def run(folder: Path, output: Path, spec: Any, *, resume: bool = False, **changes: Any) -> Watch:
    torch.manual_seed(0)
    head = TaskHead("classification", ("a", "b", "c"))
    model = load_backbone(str(folder), head, dtype="float32", device="cpu").model
    made = peftref.attach(model, spec, seed=0)
    watch = Watch(made)
    trainer = peftref.trainer(Trainer)(
        args=arguments(output, **{"max_steps": 8, **changes}), train_dataset=ROWS * 4,
        data_collator=Collator(0), adapted=made,
    )
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    return watch


def test_each_part_has_its_own_schedule_optimiser_and_tensors(
    folder: Path, tmp_path: Path
) -> None:
    watch = run(folder, tmp_path, composition(), weight_decay=0.1)
    # Linear to zero over 2, 4 and 2 steps, the second at half the rate.
    linear = [1.0, 0.5, 0.5, 0.375, 0.25, 0.125, 1.0, 0.5]
    assert watch.rates == pytest.approx([1e-2 * factor for factor in linear])
    assert [count == 0 for count in watch.moments] == [s in (0, 2, 6) for s in range(8)]
    down = [name for name in watch.values[0] if name.endswith("down.weight")]
    others = [name for name in watch.values[0] if name not in down]
    assert all(torch.equal(watch.values[1][n], watch.values[0][n]) for n in others)
    assert not any(torch.equal(watch.values[1][n], watch.values[0][n]) for n in down)
    # The second part began at the first values; everything trained in it.
    assert all(torch.equal(watch.values[2][n], watch.values[0][n]) for n in (*down, *others))
    assert not any(torch.equal(watch.values[5][n], watch.values[2][n]) for n in (*down, *others))
    assert all(p.requires_grad for p in watch.made.trainable.values())


def test_a_later_part_may_begin_where_an_earlier_one_ended(folder: Path, tmp_path: Path) -> None:
    parts = [{"name": "one"}, {"name": "two"}, {"name": "three", "rewind": ["lora"], "to": "one"}]
    watch = run(folder, tmp_path, composition(parts), max_steps=6)
    for name in watch.made.trainable:
        assert torch.equal(watch.values[4][name], watch.values[2][name]), name
        assert not torch.equal(watch.values[5][name], watch.values[4][name]), name
    for name in watch.made.head:
        assert not torch.equal(watch.values[4][name], watch.values[2][name]), name


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_resumed_training_is_the_same_to_the_bit(
    folder: Path, tmp_path: Path, cut: int
) -> None:
    whole = run(folder, tmp_path / "whole", composition())
    usual = {"save_strategy": "steps", "save_steps": cut}
    run(folder, tmp_path / "cut", composition(), **usual)
    for step in range(cut + 1, 9):
        done = tmp_path / "cut" / f"checkpoint-{step}" / "trainer_state.json"
        done.unlink(missing_ok=True)
    resumed = run(folder, tmp_path / "cut", composition(), resume=True)
    assert len(resumed.rates) == 8 - cut
    assert resumed.rates == whole.rates[cut:]
    for name, value in whole.values[-1].items():
        assert torch.equal(resumed.values[-1][name], value), name


def test_a_stock_trainer_is_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    head = TaskHead("classification", ("a", "b", "c"))
    model = load_backbone(str(folder), head, dtype="float32", device="cpu").model
    peftref.attach(model, composition())
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS,
                      data_collator=Collator(0))
    with pytest.raises(TrainingError, match="phases: this trainer does not call it"):
        trainer.train()


def test_members_keep_their_phases_under_other_names(tmp_path: Path) -> None:
    parts = [{"name": "a", "train": ["lora"]}, {"name": "b", "rewind": ["lora:down*", "head"]}]
    (tmp_path / "parts.yaml").write_text(json.dumps(composition(parts)))
    outer = {"composition": "outer", "members": [
        {"name": "own", "use": repr(str(tmp_path / "parts.yaml"))}, {"name": "lora", "use": "ia3"}]}
    found: Any = peftref.load(outer).procedures[0].arguments["phases"]
    assert [part.get("train") for part in found] == [["own"], None]
    assert found[1]["rewind"] == ["own:down*", "head"]


@pytest.mark.parametrize(("parts", "message"), [
    ([{"name": "a"}, {"name": "a"}], "'a' cannot name a phase"),
    ([{"name": "a", "to": "b"}, {"name": "b"}], "goes back to 'b'; valid: start"),
    ([{"name": "a", "train": ["adapter"]}], "'adapter'.*(lora|head)"),
])
def test_parts_that_mean_nothing_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(peftref.PeftRefError, match=message):
        peftref.compile(composition(parts), tiny("bert", "classification"))


def test_two_trainings_in_phases_cannot_be_joined() -> None:
    spec = composition([{"name": "a"}])
    spec["procedures"].append({"phases": [{"name": "b"}]})
    with pytest.raises(CompositionError, match="write one 'phases'"):
        peftref.compile(spec, tiny("bert", "classification"))


def test_every_part_needs_a_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="2 steps are too few for the phases down, both, again"):
        run(folder, tmp_path, composition(), max_steps=2)
    made = Phases(PhasesArguments(phases=(Part(name="a", share=1e-9), Part(name="b"))))
    with pytest.raises(TrainingError, match="too few"):
        made.phases(100)
