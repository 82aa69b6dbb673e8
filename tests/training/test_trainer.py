"""What is added to a Trainer class, against loops written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainingArguments

import peftref
from peftref.errors import TrainingError
from peftref.procedures.base import Procedure, ProcedureArguments
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.encode import Collator
from peftref.training.trainer import last_checkpoint
from tests.training.assets import bert_folder

ROWS = [
    {"input_ids": [2, *range(5 + n % 7, 12 + n % 3), 3], "labels": n % 3,
     "attention_mask": [1] * (9 + n % 3 - n % 7)} for n in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("model") / "bert", dropout=0.0)


def adapted(folder: Path, composition: str = "lora") -> Any:
    head = TaskHead("classification", ("a", "b", "c"))
    torch.manual_seed(0)
    model = load_backbone(str(folder), head, dtype="float32", device="cpu").model
    return peftref.attach(model, composition, seed=0)


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    usual = {
        "output_dir": str(output), "per_device_train_batch_size": 8, "max_steps": 3,
        "learning_rate": 1e-2, "train_sampling_strategy": "sequential", "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    }
    return TrainingArguments(**{**usual, **changes})


def train(made: Any, output: Path, **changes: Any) -> Any:
    trainer = peftref.trainer(Trainer)(
        args=arguments(output, **changes), train_dataset=ROWS, data_collator=Collator(0),
        adapted=made,
    )
    trainer.train()
    return trainer


def values(made: Any) -> dict[str, Tensor]:
    return {**made.trainable, **made.head}


def test_training_is_the_loop_that_one_would_write(folder: Path, tmp_path: Path) -> None:
    by_trainer, by_hand = adapted(folder), adapted(folder)
    train(by_trainer, tmp_path, lr_scheduler_type="constant", weight_decay=0.1)
    by_hand.handled = True
    parameters = list(values(by_hand).values())
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    by_hand.model.train()
    for step in range(3):
        batch = Collator(0)(ROWS[8 * step:8 * step + 8])
        by_hand.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    for name, value in values(by_hand).items():
        # Same operations; fused and plain AdamW round differently.
        torch.testing.assert_close(values(by_trainer)[name], value, rtol=1e-5, atol=1e-7)


def test_accumulated_micro_batches_are_one_batch(folder: Path, tmp_path: Path) -> None:
    whole, parts = adapted(folder), adapted(folder)
    # Plain gradient descent, so that the size of the gradient shows.
    usual = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
    train(whole, tmp_path / "a", **usual)
    train(parts, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4,
          **usual)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=1e-4, atol=1e-6)


class Penalty(Procedure[ProcedureArguments]):
    """A procedure that pulls every adapter tensor to zero, and counts its moments."""

    name = "penalty"

    @property
    def needs_data(self) -> bool:
        return True

    def __init__(self, weight: float) -> None:
        super().__init__(ProcedureArguments())
        self.weight = weight
        self.moments: list[str] = []
        self.state: dict[str, Any] = {"seen": 0, "tensor": torch.zeros(2)}

    def setup(self, adapter: Any, batches: Any, forward: Any) -> None:
        self.moments.append(f"setup {len(list(batches))}")

    def loss(self, model: Any, inputs: Any, outputs: Any) -> Tensor:
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        self.state["seen"] += 1
        self.state["tensor"] += 1
        squares = [
            (p**2).sum() for n, p in model.named_parameters() if p.requires_grad and "lora" in n
        ]
        return self.weight * torch.stack(squares).sum()

    def before_step(self, adapter: Any, step: int, total: int) -> None:
        self.moments.append(f"before {step}/{total}")

    def after_backward(self, adapter: Any, step: int, total: int) -> None:
        assert any(p.grad is not None for p in adapter.trainable.values())
        self.moments.append("backward")

    def after_step(self, adapter: Any, step: int, total: int) -> None:
        self.moments.append("step")

    def on_evaluate(self, adapter: Any, metrics: Any) -> None:
        self.moments.append(f"evaluate {sorted(metrics)}")

    def at_end(self, adapter: Any) -> None:
        self.moments.append("end")

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = dict(state)


def with_penalty(folder: Path, weight: float) -> tuple[Any, Penalty]:
    made, penalty = adapted(folder), Penalty(weight)
    made.procedures = (penalty,)
    return made, penalty


def test_procedures_are_called_at_their_moments_and_their_loss_counts_once(
    folder: Path, tmp_path: Path
) -> None:
    usual = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    whole, penalty = with_penalty(folder, 0.5)
    train(whole, tmp_path / "a", **usual)
    assert penalty.moments == [
        "setup 3", "before 0/2", "backward", "step", "before 1/2", "backward", "step", "end"
    ]
    plain = adapted(folder)
    train(plain, tmp_path / "c", **usual)
    assert any(not torch.equal(whole.trainable[name], plain.trainable[name])
               for name in plain.trainable)
    parts, _ = with_penalty(folder, 0.5)
    train(parts, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4,
          **usual)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_adapter_and_head_and_the_stock_resume_takes_it(
    folder: Path, tmp_path: Path
) -> None:
    through, first = with_penalty(folder, 0.1)
    train(through, tmp_path / "a", max_steps=4)
    stopped, _ = with_penalty(folder, 0.1)
    train(stopped, tmp_path / "b", max_steps=4, save_strategy="steps", save_steps=2)
    found = last_checkpoint(tmp_path / "b")
    assert found is not None
    assert found == tmp_path / "b" / "checkpoint-4"
    with safe_open(found / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    held = {f"adapter.{name}" for name in stopped.state_dict()}
    assert names == held | {f"head.{name}" for name in stopped.head} | {"procedure.0.tensor"}
    # A checkpoint without its last file was not finished: the one before it counts.
    (found / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path / "b") == tmp_path / "b" / "checkpoint-2"
    resumed, penalty = with_penalty(folder, 0.1)
    trainer = peftref.trainer(Trainer)(
        args=arguments(tmp_path / "b", max_steps=4), train_dataset=ROWS,
        data_collator=Collator(0), adapted=resumed,
    )
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(values(resumed)[n], v) for n, v in values(through).items())
    assert penalty.state["seen"] == first.state["seen"] == 4
    assert torch.equal(penalty.state["tensor"], first.state["tensor"])
    assert penalty.moments[0] == "before 2/4"  # no second set-up


def test_a_checkpoint_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    train(adapted(folder), tmp_path, save_strategy="steps", save_steps=3)
    other = peftref.trainer(Trainer)(
        args=arguments(tmp_path), train_dataset=ROWS, data_collator=Collator(0),
        adapted=adapted(folder, "ia3"),
    )
    with pytest.raises(TrainingError, match=r"no checkpoint of this composition.*missing"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    empty = peftref.trainer(Trainer)(args=arguments(tmp_path / "none"), adapted=adapted(folder))
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        empty.train(resume_from_checkpoint=True)


def test_a_loss_that_is_no_number_stops_before_the_parameters(
    folder: Path, tmp_path: Path
) -> None:
    made = adapted(folder)
    before = {name: value.detach().clone() for name, value in values(made).items()}
    with torch.no_grad():
        made.model.bert.embeddings.word_embeddings.weight[20:] = torch.inf
    rows = [{**row, "input_ids": [60] * len(row["input_ids"])} for row in ROWS]
    trainer = peftref.trainer(Trainer)(
        args=arguments(tmp_path), train_dataset=rows, data_collator=Collator(0), adapted=made
    )
    with pytest.raises(TrainingError, match=r"step 1 of 3: the loss is nan at learning rate 0.01"):
        trainer.train()
    assert all(torch.equal(values(made)[name], value) for name, value in before.items())


def test_nothing_trains_unseen(folder: Path, tmp_path: Path) -> None:
    made = adapted(folder)
    made.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"1 trainable parameters belong neither.*word_embed"):
        train(made, tmp_path)
    plain = load_backbone(
        str(folder), TaskHead("classification", ("a", "b")), dtype="float32", device="cpu"
    ).model
    with pytest.raises(TrainingError, match="has no adapter attached"):
        peftref.trainer(Trainer)(model=plain, args=arguments(tmp_path))
    with pytest.raises(TrainingError, match="not the model that was adapted"):
        peftref.trainer(Trainer)(
            model=adapted(folder).model, args=arguments(tmp_path), adapted=adapted(folder)
        )


def test_rates_are_the_composition_s_own_when_asked(folder: Path, tmp_path: Path) -> None:
    made = adapted(folder)
    cited = {group["lr"] for group in made.parameter_groups()}
    trainer = peftref.trainer(Trainer)(
        model=made.model, args=arguments(tmp_path), cited_rates=0.5, head_rate=0.03
    )
    groups = trainer.create_optimizer().param_groups
    head = {id(each) for each in made.head.values()}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rate for key, rate in rates.items() if key in head} == {0.03}
    assert {rate for key, rate in rates.items() if key not in head} == {0.5 * r for r in cited}


def test_a_quantised_backbone_is_trained_with_adapters_only(folder: Path, tmp_path: Path) -> None:
    made = adapted(folder)

    class Quantiser:
        is_trainable = True
        is_qat_trainable = False

    # What transformers asks of a model that was loaded in 4 bits.
    made.model.is_quantized, made.model.hf_quantizer = True, Quantiser()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=made.model, args=arguments(tmp_path))
    peftref.trainer(Trainer)(model=made.model, args=arguments(tmp_path))
    assert not hasattr(made.model, "_hf_peft_config_loaded") or not (
        made.model._hf_peft_config_loaded
    )
