"""Whole runs on tiny backbones: what they leave behind, and what they give back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import peftref
from peftref.errors import (
    ArtifactError,
    BackboneError,
    CompositionError,
    DataError,
    SpecError,
    TrainingError,
)
from peftref.training.restore import attached_artifact, open_artifact
from peftref.training.session import Progress, TrainingSession
from tests.training.assets import bert_folder, llama_folder, run_settings, write_rows

COMPOSITIONS = ["none", "lora(rank=2) + prefix_tuning(length=3)", "adamix", "sparse_adapter"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    bert_folder(folder / "bert")
    llama_folder(folder / "llama")
    write_rows(folder / "rows.jsonl", 90)
    return folder


@pytest.fixture(scope="module")
def session(root: Path) -> TrainingSession:
    return TrainingSession(run_settings(root / "bert", root / "rows.jsonl"))


def state(session: TrainingSession) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in session.model.state_dict().items()}


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_run_leaves_the_session_as_it_was_and_its_artifact_gives_the_same_scores(
    session: TrainingSession, composition: str, tmp_path: Path
) -> None:
    before, kind = state(session), type(session.model)
    asked = {name: p.requires_grad for name, p in session.model.named_parameters()}
    seen: list[Progress] = []
    first = session.fit(composition, output=tmp_path / "a", on_evaluate=seen.append)
    after = state(session)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(session.model) is kind
    assert {n: p.requires_grad for n, p in session.model.named_parameters()} == asked
    assert [(each.step, each.total) for each in seen] == [(3, 6), (6, 6)]
    assert session.fit(composition).metrics == first.metrics
    assert session.fit(composition, seed=1).metrics != first.metrics
    # The artifact is the run: here, in another process's place, and through one call.
    assert session.test(tmp_path / "a", "validation") == first.metrics
    opened = open_artifact(tmp_path / "a", device="cpu")
    assert session.evaluate(opened.adapted, "validation") == pytest.approx(first.metrics, rel=1e-6)
    model, tokenizer = peftref.from_pretrained(tmp_path / "a", device="cpu")
    text = tokenizer(["w1 w2 w3"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**text).logits, opened.model(**text).logits)
    assert not (tmp_path / "a.checkpoints").exists()


def test_how_often_a_run_is_scored_does_not_change_it(
    session: TrainingSession, root: Path
) -> None:
    often = TrainingSession(
        run_settings(root / "bert", root / "rows.jsonl", evaluation={"every": 1})
    )
    assert often.fit("lora").metrics == session.fit("lora").metrics


def test_mixed_precision_leaves_nothing_on_the_model(root: Path) -> None:
    settings = run_settings(
        root / "bert", root / "rows.jsonl", arguments={"bf16": True}, learning_rate=0.1
    )
    used, fresh = TrainingSession(settings), TrainingSession(settings)
    used.fit("lora")
    # A forward that stayed on the instance would hide the prompt from the second run.
    assert used.fit("prompt_tuning").metrics == fresh.fit("prompt_tuning").metrics
    assert "forward" not in vars(used.model)


def test_training_learns(session: TrainingSession) -> None:
    losses: list[float] = []
    session.fit("houlsby_adapter", steps=60, rate=10.0,
                on_evaluate=lambda progress: losses.append(progress.loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("composition", ["lora", "prefix_tuning(length=2)", "prompt_tuning"])
def test_a_language_model_learns_continuations(
    root: Path, composition: str, tmp_path: Path
) -> None:
    rows = [{"text": f"w{n} w{n + 1}", "target": "w7 w8"} for n in range(48)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = TrainingSession(run_settings(
        root / "llama", {"source": str(path), "target": "target"}, steps=8, learning_rate=5e-2
    ))
    losses: list[float] = []
    result = session.fit(
        composition, output=tmp_path / "a",
        on_evaluate=lambda progress: losses.append(progress.loss),
    )
    assert losses[-1] < losses[0]
    # The loss is the mean over all target tokens, whatever the batches.
    opened = open_artifact(tmp_path / "a", device="cpu")
    total = count = 0.0
    for row in session.encoded("validation").rows:
        batch = {name: torch.tensor([value]) for name, value in row.items()}
        with torch.no_grad():
            logits = opened.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[0].double()
        labels = batch["labels"][0, 1:]
        kept = labels != -100
        chosen = logits[:-1].log_softmax(-1)[kept].gather(1, labels[kept].unsqueeze(1))
        total, count = total - float(chosen.sum()), count + int(kept.sum())
    assert result.loss == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(TrainingError, match="no task head of its own"):
        session.fit("none")


def test_a_quantity_is_learnt_by_a_decoder(root: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{n} w{n % 3}", "score": n / 17} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = TrainingSession(run_settings(root / "llama", path, learning_rate=1e-2))
    result = session.fit("lora", output=tmp_path / "a")
    assert set(result.metrics) == {"loss", "pearson", "spearman"}
    assert session.test(tmp_path / "a", "validation") == result.metrics


def test_a_run_can_be_ended_early_and_resumed(session: TrainingSession, tmp_path: Path) -> None:
    through = session.fit("lora", output=tmp_path / "a")
    stopped = session.fit("lora", output=tmp_path / "b", on_evaluate=lambda _: True)
    assert (stopped.stopped, stopped.steps, stopped.artifact) == (True, 3, None)
    assert not (tmp_path / "b").exists()
    with pytest.raises(TrainingError, match="another run; different: seed"):
        session.fit("lora", output=tmp_path / "b", resume=True, seed=9)
    resumed = session.fit("lora", output=tmp_path / "b", resume=True)
    assert resumed.metrics == through.metrics
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")
    )
    assert first == second


def test_an_artifact_is_replaced_only_at_the_end(session: TrainingSession, tmp_path: Path) -> None:
    session.fit("lora", output=tmp_path / "a", steps=1)
    before = (tmp_path / "a" / "peftref.json").read_bytes()

    def fail(_: Progress) -> bool:
        raise TrainingError("stopped here")

    with pytest.raises(TrainingError, match="stopped here"):
        session.fit("ia3", output=tmp_path / "a", steps=1, on_evaluate=fail)
    assert (tmp_path / "a" / "peftref.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="is no artifact"):
        session.fit("lora", output=tmp_path / "other", steps=1)


def test_what_cannot_be_run_is_said_and_the_session_goes_on(session: TrainingSession) -> None:
    before = state(session)
    for wrong, error in [("lroa", SpecError), ("lora(rank=0)", SpecError),
                         ("lora(site='cross_attention.query')", BackboneError)]:
        with pytest.raises((error, CompositionError)):
            session.fit(wrong)
    with pytest.raises(DataError, match="no holdout split"):
        session.encoded("holdout")
    after = state(session)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert session.fit("lora", steps=1).steps == 1


def test_a_damaged_or_foreign_artifact_is_refused(
    session: TrainingSession, root: Path, tmp_path: Path
) -> None:
    session.fit("lora", output=tmp_path / "a", steps=1)
    session.fit("none", output=tmp_path / "head", steps=1)
    other = bert_folder(tmp_path / "other")
    from transformers import BertModel

    torch.manual_seed(7)
    changed = BertModel.from_pretrained(other)
    with torch.no_grad():
        changed.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    changed.save_pretrained(other)
    for name in ("a", "head"):
        with pytest.raises(ArtifactError, match="was trained on"):
            open_artifact(tmp_path / name, backbone=str(other), device="cpu")
    with pytest.raises(BackboneError, match=r"needs its backbone.*There is no folder"):
        open_artifact(tmp_path / "a", backbone=str(tmp_path / "gone"), device="cpu")
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        peftref.from_pretrained(tmp_path / "a")
    with pytest.raises(ArtifactError, match="no such folder"):
        peftref.from_pretrained(tmp_path / "nothing")
    shutil.rmtree(tmp_path / "other")
    labels = write_rows(tmp_path / "rows.jsonl", 60, labels=("a", "b"))
    two = TrainingSession(run_settings(root / "bert", labels))
    with pytest.raises(ArtifactError, match="knows the labels a, b, c"):
        two.test(tmp_path / "head", "validation")


def test_an_artifact_visits_a_model_and_leaves_it(session: TrainingSession, tmp_path: Path) -> None:
    session.fit("bitfit", output=tmp_path / "a", steps=2, rate=50.0)
    before = {n: v for n, v in state(session).items() if "classifier" not in n}
    text = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4)}
    with torch.no_grad():
        plain = session.model.base_model(**text).last_hidden_state
        with attached_artifact(session.model, tmp_path / "a"):
            visited = session.model.base_model(**text).last_hidden_state
        gone = session.model.base_model(**text).last_hidden_state
    assert torch.equal(plain, gone)
    assert not torch.equal(plain, visited)
    assert all(torch.equal(session.model.state_dict()[n], v) for n, v in before.items())
